-- The incarnations whose lease has run out, by Redis' own clock.
--
-- KEYS[1]  leases  ZSET <i> -> Redis ms
-- ARGV[1]  most to return
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
