-- Keep the dead letters of one model within bounds, once some were added. What is quarantined (the
-- letters that begin with `mark`) goes first, oldest first: anybody who may push a message can add
-- to that, and it must not cost a letter that stands for an accepted request. The newest stays.
--
-- This text only defines a function; `settle.KEEP_LETTERS` calls it, and so does force.lua.
--
-- dead      dead:<m>        list, newest first
-- counter   quarantined:<m> string, at least how many of them are quarantined
-- added     how many of those that were added are
-- most      more of these than so many are cut down to `left`: the list is gone through rarely
-- bytes     what the list may take in memory; beyond that it is cut down to three quarters
-- seconds   from now on until all of it expires
-- Returns how many went.
local function keep_letters(dead, counter, added, most, left, bytes, seconds, mark)
  most, left, bytes = tonumber(most), tonumber(left), tonumber(bytes)
  redis.call('EXPIRE', dead, seconds)
  local waste = redis.pcall('INCRBY', counter, added)
  if type(waste) ~= 'number' then
    redis.call('DEL', counter)
    waste = most + 1
  end
  redis.call('EXPIRE', counter, seconds)
  local taken = redis.pcall('MEMORY', 'USAGE', dead, 'SAMPLES', 0)
  local heavy = type(taken) == 'number' and taken > bytes
  if waste <= most and not heavy then
    return 0
  end
  local sizes, marked, total = {}, {}, 0
  waste = 0
  for start = 0, redis.call('LLEN', dead) - 1, 16 do
    for _, letter in ipairs(redis.call('LRANGE', dead, start, start + 15)) do
      local n = #sizes + 1
      sizes[n], marked[n] = #letter, string.sub(letter, 1, #mark) == mark
      total = total + #letter
      waste = waste + (marked[n] and 1 or 0)
    end
  end
  local room = heavy and bytes * 0.75 or total
  local gone = 0
  for _, quarantined in ipairs({true, false}) do
    for n = #sizes, 2, -1 do
      if marked[n] == quarantined and (total > room or (quarantined and waste > left)) then
        redis.call('LSET', dead, n - 1, '')
        total = total - sizes[n]
        waste = waste - (quarantined and 1 or 0)
        gone = gone + 1
      end
    end
  end
  if gone > 0 then
    redis.call('LREM', dead, 0, '')
  end
  redis.call('SET', counter, waste, 'EX', seconds)
  return gone
end
