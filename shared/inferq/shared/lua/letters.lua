-- Keep the dead letters of one model within bounds, after some were added. Quarantined ones (which
-- begin with `mark`) are dropped first, oldest first: anybody who may push a message can add some,
-- and they must not displace letters of accepted requests. The newest letter stays.
--
-- This text only defines a function; `settle.KEEP_LETTERS` calls it, and so does force.lua.
--
-- dead      dead:<m>        list, newest first
-- counter   quarantined:<m> string, about how many of them are quarantined: too many where some were
--                           dropped by hand (never more than there are letters), too few where
--                           somebody else wrote there
-- added     how many of those that were added are
-- most      more of these than so many are cut down to `left`, which is near: so that the end of
--           the list is gone through rarely, and not far
-- bytes     what the list may take in memory; beyond that it is cut down to three quarters
-- seconds   from now on until all of it expires
-- Returns how many were dropped.
local function keep_letters(dead, counter, added, most, left, bytes, seconds, mark)
  most, left, bytes = tonumber(most), tonumber(left), tonumber(bytes)
  redis.call('EXPIRE', dead, seconds)
  local waste = redis.pcall('INCRBY', counter, added)
  if type(waste) ~= 'number' then
    redis.call('SET', counter, added)
    waste = tonumber(added)
  end
  redis.call('EXPIRE', counter, seconds)
  waste = math.min(waste, redis.call('LLEN', dead))
  local excess = waste > most and waste - left or 0
  local taken = redis.pcall('MEMORY', 'USAGE', dead, 'SAMPLES', 0)
  local heavy = type(taken) == 'number' and taken > bytes and taken - bytes * 0.75 or 0
  if excess == 0 and heavy == 0 then
    return 0
  end
  local gone, found = 0, 0
  local function drop(all)
    for last = redis.call('LLEN', dead) - 1, 1, -16 do
      local first = math.max(1, last - 15)
      local letters = redis.call('LRANGE', dead, first, last)
      for n = #letters, 1, -1 do
        if excess <= 0 and heavy <= 0 then
          return
        end
        local quarantined = string.sub(letters[n], 1, #mark) == mark
        if letters[n] ~= '' and (quarantined or all) then
          redis.call('LSET', dead, first + n - 1, '')
          gone = gone + 1
          found = found + (quarantined and 1 or 0)
          excess = excess - (quarantined and 1 or 0)
          heavy = heavy - #letters[n]
        end
      end
    end
    if not all then
      waste, excess = found, 0
    end
  end
  drop(false)
  if heavy > 0 then
    drop(true)
  end
  if gone > 0 then
    redis.call('LREM', dead, -gone, '')
  end
  redis.call('SET', counter, math.max(0, waste - found), 'EX', seconds)
  return gone
end
