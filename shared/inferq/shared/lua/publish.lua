-- Tell who waits for a large result, if anybody does: what is stored is published, so that it need
-- not travel to Redis twice.
--
-- KEYS[1]  celery-task-meta-<id>, also the name of the channel
-- Returns the number of those who were told.
if redis.call('PUBSUB', 'NUMSUB', KEYS[1])[2] == 0 then
  return 0
end
local stored = redis.call('GET', KEYS[1])
return stored and redis.call('PUBLISH', KEYS[1], stored) or 0
