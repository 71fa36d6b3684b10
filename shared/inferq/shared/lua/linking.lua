-- Note the request whose links a worker publishes now, in place of the one before it.
--
-- KEYS[1]  fence:<i>  if it is gone, others have taken over the worker: nothing is noted
-- KEYS[2]  running:<i>    SET
-- KEYS[3]  running:<i>    SET   of the one before
-- KEYS[4]  attempts:<m>   HASH  of the one before
-- ARGV[1]  "<m>/@<id>"; empty: none
-- ARGV[2]  that of the one before; empty: none
-- ARGV[3]  "@<id>" of the one before, whose worker lived; empty: that is not known
-- pcall: the data plane reports keys of the wrong type.
redis.pcall('SREM', KEYS[3], ARGV[2])
redis.pcall('HDEL', KEYS[4], ARGV[3])
if ARGV[1] ~= '' and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('SADD', KEYS[2], ARGV[1])
end
