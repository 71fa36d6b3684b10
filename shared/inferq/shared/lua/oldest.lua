-- When the request that is claimed next from each of these queues was sent.
--
-- KEYS[1..]  queue:<m>:<priority>  lists; the right end is claimed first
-- Returns as many strings: Redis ms; 'none' if the queue is empty, '' if the message does not say.
-- Only the beginning of a message is looked at, where ours have their headers: a quote within a
-- string is escaped there, so no input and no other header passes for this one.
local found = {}
for n = 1, #KEYS do
  local message = redis.call('LINDEX', KEYS[n], -1)
  if message then
    found[n] = string.match(string.sub(message, 1, 16384), '"inferq_sent_ms": ?([%d.]+)') or ''
  else
    found[n] = 'none'
  end
end
return found
