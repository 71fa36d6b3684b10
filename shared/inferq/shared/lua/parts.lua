-- Results of a chord's parts, beginning with a given one: up to so many bytes, at least one.
--
-- KEYS[1]  celery-taskset-meta-<id>.j  ZSET of results by their place in the header
-- ARGV[1]  rank of the first, from 0
-- ARGV[2]  bytes; beyond them no more is read
local found, bytes = {}, 0
repeat
  local part = redis.call('ZRANGE', KEYS[1], ARGV[1] + #found, ARGV[1] + #found)[1]
  if not part then break end
  found[#found + 1] = part
  bytes = bytes + #part
until bytes >= tonumber(ARGV[2])
return found
