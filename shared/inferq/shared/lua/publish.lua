-- Publish those of these results for which somebody waits. The stored result is published, which may
-- not be the one that was computed last; so it need not be sent to Redis twice, either.
--
-- KEYS[1..]  celery-task-meta-<id>, also the name of the channel; a thousand at most
-- Returns the number of those who were told.
local told = 0
local everywhere = redis.call('PUBSUB', 'NUMPAT') > 0
local listening = redis.call('PUBSUB', 'NUMSUB', unpack(KEYS))
for n = 1, #KEYS do
  if everywhere or listening[2 * n] > 0 then
    local stored = redis.pcall('GET', KEYS[n])
    if type(stored) == 'string' then
      told = told + redis.call('PUBLISH', KEYS[n], stored)
    end
  end
end
return told
