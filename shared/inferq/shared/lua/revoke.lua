-- Take over one expired incarnation: from here on it cannot settle, and the caller moves its
-- claims back. Metadata only. Safe to repeat: a recoverer that dies half-way is followed by another
-- once the lease that this script gives to the recovery has run out too.
--
-- KEYS[1]  leases       ZSET <i> -> Redis ms
-- KEYS[2]  fence:<i>
-- KEYS[3]  running:<i>  SET "<m>/<id>": these were computing, so each has one more attempt
-- ARGV[1]  <i>
-- ARGV[2]  ms that the recovery may take before another one may start
-- ARGV[3]  prefix of attempts:<m>
-- ARGV[4]  '1': revoke even though the lease has not run out (its process is known to be dead)
-- ARGV[5]  seconds that attempts:<m> outlives the last death
-- Returns 1 if the caller is to recover <i> now, else 0.
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends or (tonumber(ends) > now and ARGV[4] ~= '1') then
  return 0
end
redis.call('DEL', KEYS[2])
-- pcall: a key of the wrong type must not keep this incarnation's requests from coming back.
local running = redis.pcall('SMEMBERS', KEYS[3])
for _, member in ipairs(running.err and {} or running) do
  local cut = string.find(member, '/', 1, true)
  if cut then
    local attempts = ARGV[3] .. string.sub(member, 1, cut - 1)
    redis.pcall('HINCRBY', attempts, string.sub(member, cut + 1), 1)
    redis.pcall('EXPIRE', attempts, ARGV[5])
  end
end
redis.call('DEL', KEYS[3])
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[1])
return 1
