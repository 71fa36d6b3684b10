-- Take one dead letter out of its model's list; if several try, only one does. Its request goes back
-- into its queue as if it never failed, or everything of it is dropped.
--
-- KEYS[1]    dead:<m>                list, newest first
-- KEYS[2]    queue:<m>:<priority>    list; the request goes to its left end
-- KEYS[3]    attempts:<m>            hash
-- KEYS[4]    celery-task-meta-<id>   the result; a key that never exists if the letter has no id
-- KEYS[5..]  its claim-checked payloads
-- ARGV[1]    the letter
-- ARGV[2]    'replay' or 'drop'; what follows is for 'replay'
-- ARGV[3]    the request
-- ARGV[4]    the result that was read before, '' if there was none
-- ARGV[5]    seconds that its payloads are kept from now on
-- ARGV[6..]  its fields of attempts:<m>
-- Returns 'done'; 'gone': it is no longer a letter; 'changed': there is another result now; or the
-- key of a missing payload. Unless it is 'done', nothing was changed.
if redis.call('LPOS', KEYS[1], ARGV[1], 'RANK', -1) == false then
  return 'gone'
end
if ARGV[2] == 'replay' then
  if (redis.call('GET', KEYS[4]) or '') ~= ARGV[4] then
    return 'changed'
  end
  for n = 5, #KEYS do
    if redis.call('EXISTS', KEYS[n]) == 0 then
      return KEYS[n]
    end
  end
end
redis.call('LREM', KEYS[1], -1, ARGV[1])
if ARGV[2] == 'drop' then
  for n = 5, #KEYS do
    redis.call('UNLINK', KEYS[n])
  end
  return 'done'
end
redis.call('LPUSH', KEYS[2], ARGV[3])
redis.call('DEL', KEYS[4])
for n = 6, #ARGV do
  redis.call('HDEL', KEYS[3], ARGV[n])
end
for n = 5, #KEYS do
  redis.call('EXPIRE', KEYS[n], ARGV[5])
end
return 'done'
