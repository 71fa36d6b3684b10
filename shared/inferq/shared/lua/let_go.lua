-- Let go of a chord that a dead worker was about to end, so that another one may.
--
-- KEYS[1]  celery-taskset-meta-<group>.c  STRING  Celery's claim on the chord's body
-- KEYS[2]  fence:<i>  of who holds the claim
-- ARGV[1]  what stands in the claim if it is that worker's
-- Returns 1 if the claim is gone by now.
if redis.call('EXISTS', KEYS[2]) == 1 or redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
