-- Run commands although Redis is at its maxmemory (noeviction): what a worker needs to store
-- results, to acknowledge and to claim, since that is what makes room again.
--
-- Redis refuses commands that may take memory to a script too, unless the script has written
-- before (scriptVerifyOOM in its script.c): so it begins with the DEL of a key that never exists.
-- It is only used while Redis is full, since whatever passes through Lua is copied twice.
--
-- KEYS[1]  a key that never exists
-- ARGV     the commands, one after another: the number of words of each, then its words. TELL with
--          some keys of results publishes what is stored, as publish.lua does; LETTERS does the same
--          as letters.lua, whose text goes ahead of this
-- Returns their replies, errors among them.
redis.call('DEL', KEYS[1])
local function tell(first, last)
  local told = 0
  for n = first, last do
    local stored = redis.pcall('GET', ARGV[n])
    if type(stored) == 'string' then
      told = told + redis.call('PUBLISH', ARGV[n], stored)
    end
  end
  return told
end
local replies = {}
local at = 1
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  if ARGV[at + 1] == 'TELL' then
    replies[#replies + 1] = tell(at + 2, at + words)
  elseif ARGV[at + 1] == 'LETTERS' then
    replies[#replies + 1] = keep_letters(unpack(ARGV, at + 2, at + words))
  else
    replies[#replies + 1] = redis.pcall(unpack(ARGV, at + 1, at + words))
  end
  at = at + words + 1
end
return replies
