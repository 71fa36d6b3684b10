-- Run commands although Redis is at its maxmemory (noeviction): what a worker needs to store
-- results, to acknowledge and to claim, since that is what makes room again.
--
-- Redis refuses commands that may take memory to a script too, unless the script has written
-- before (scriptVerifyOOM in its script.c): so it begins with the DEL of a key that never exists.
-- Only ever used while Redis is full: what passes through Lua is copied twice.
--
-- KEYS[1]  a key that never exists
-- ARGV     the commands, one after another: the number of its words, then these; PUBLISH with a
--          channel alone publishes what is stored under its name, as publish.lua does
-- Returns their replies, errors among them.
redis.call('DEL', KEYS[1])
local replies = {}
local at = 1
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  if words == 2 and ARGV[at + 1] == 'PUBLISH' then
    local stored = redis.pcall('GET', ARGV[at + 2])
    local found = type(stored) == 'string'
    replies[#replies + 1] = found and redis.pcall('PUBLISH', ARGV[at + 2], stored) or 0
  else
    replies[#replies + 1] = redis.pcall(unpack(ARGV, at + 1, at + words))
  end
  at = at + words + 1
end
return replies
