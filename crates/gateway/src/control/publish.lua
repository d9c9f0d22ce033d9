-- What one instance says of itself, about once a second.
--
-- KEYS  alive (sorted set: name by time), totals (hash of the fleet), own (hash of this instance)
-- ARGV  name, milliseconds it counts as alive, milliseconds what it said is kept, about, rates,
--       requests and blocked since its start, the same as this Redis was last known to have
-- Gives requests and blocked of the fleet.
local alive, totals, own = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', alive, now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', alive, '-inf', now - tonumber(ARGV[2]))

-- What it has told before is in the totals already, whether it heard so or not.
local answer = {}
for place, field in ipairs({'requests', 'blocked'}) do
  local known = tonumber(redis.call('HGET', own, field) or ARGV[7 + place])
  local count = math.max(tonumber(ARGV[5 + place]), known)
  redis.call('HSET', own, field, string.format('%.0f', count))
  answer[place] = redis.call('HINCRBY', totals, field, string.format('%.0f', count - known))
end
redis.call('HSET', own, 'about', ARGV[4], 'rates', ARGV[5])
redis.call('PEXPIRE', own, ARGV[3])
redis.call('PEXPIRE', alive, ARGV[3])
-- A month without any instance, and the fleet is another one.
redis.call('PEXPIRE', totals, 2678400000)
return answer
