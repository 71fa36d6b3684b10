-- Renew a worker incarnation's lease, if it still has a fence; at its start, give it both.
-- Begins with a write that needs no memory, as a full Redis then lets it through (see force.lua).
--
-- KEYS[1]    fence:<i>     exists as long as <i> may settle; the number of its last MULTI that did
-- KEYS[2]    leases        ZSET <i> -> Redis ms at which the lease ends
-- KEYS[3..]  serving:<m>   ZSET <i> -> the same, per model that <i> serves
-- ARGV[1]    <i>
-- ARGV[2]    lease in ms
-- ARGV[3]    '1' at its start
-- ARGV[4]    at its start: the incarnation before, or ''; that one is recovered once more, since it
--            may still have written something after it was recovered
-- Returns {1 or 0 (no fence: the lease is lost), Redis ms as a string, 1 if it had no lease before
-- or 0, and the places in KEYS of those with the wrong type}. pcall: these are left alone.
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local stamp = string.format('%.3f', now)
local ends = string.format('%.0f', now + ARGV[2])
redis.pcall('ZREM', KEYS[2], '')
if ARGV[3] == '1' then
  redis.call('SET', KEYS[1], 0)
  if ARGV[4] ~= '' then
    redis.pcall('ZADD', KEYS[2], 'NX', ends, ARGV[4])
  end
elseif redis.call('EXISTS', KEYS[1]) == 0 then
  return {0, stamp, 0, {}}
end
local wrong_type = {}
local added = 0
for n = 2, #KEYS do
  if n > 2 then
    redis.pcall('ZREMRANGEBYSCORE', KEYS[n], '-inf', '(' .. stamp)
  end
  local reply = redis.pcall('ZADD', KEYS[n], ends, ARGV[1])
  if type(reply) == 'table' then
    if not string.find(reply.err, 'WRONGTYPE', 1, true) then
      return reply
    end
    wrong_type[#wrong_type + 1] = n
  elseif n == 2 then
    added = reply
  end
end
return {1, stamp, added, wrong_type}
