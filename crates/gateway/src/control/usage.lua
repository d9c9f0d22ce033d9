-- Adds one batch of usage to its hour and to its day, once.
--
-- KEYS  last (string: number of the writer's last batch), hour, day (hashes: row -> counts)
-- ARGV  number of the batch, seconds that is remembered, seconds an hour is kept, seconds a day is kept,
--       rows a bucket may have, the row of what is beyond them, then row and counts (`1 0 12 …`) of each
-- Gives 1, or 0 when it was added before.
local MOST = 9007199254740991
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])

local function sum(one, other)
  local sums = {}
  for count in string.gmatch(one, '%d+') do sums[#sums + 1] = count end
  local place = 0
  for count in string.gmatch(other, '%d+') do
    place = place + 1
    if count ~= '0' or not sums[place] then
      local both = tonumber(sums[place] or '0') + tonumber(count)
      sums[place] = string.format('%.0f', math.min(both, MOST))
    end
  end
  return table.concat(sums, ' ')
end

for number = 2, 3 do
  local bucket = KEYS[number]
  local free = tonumber(ARGV[5]) - redis.call('HLEN', bucket)
  for place = 7, #ARGV, 2 do
    local row = ARGV[place]
    local before = redis.call('HGET', bucket, row)
    if not before and free <= 0 then
      row = ARGV[6]
      before = redis.call('HGET', bucket, row)
    end
    if not before then free = free - 1 end
    redis.call('HSET', bucket, row, before and sum(before, ARGV[place + 1]) or ARGV[place + 1])
  end
  redis.call('EXPIRE', bucket, ARGV[number + 1])
end
return 1
