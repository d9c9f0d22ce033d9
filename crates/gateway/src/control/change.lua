-- Makes the next version of the control data, if the one the caller has seen is still the last.
--
-- KEYS  about (hash: version, epoch, floor), changes (sorted set: kind:id by version), audit (stream),
--       then a hash id -> "version json" for each kind
-- ARGV  version seen, name for a new epoch, channel, bound of changes, bound of the audit,
--       number of rows, then kind (from 1), id, json ('' to remove) of each; then records of the audit
-- Gives the new version, or -1.
local about, changes, audit = KEYS[1], KEYS[2], KEYS[3]
local version = tonumber(redis.call('HGET', about, 'version') or '0')
if version ~= tonumber(ARGV[1]) then return -1 end
version = version + 1

redis.call('HSETNX', about, 'epoch', ARGV[2])
redis.call('HSET', about, 'version', version)
local at = 7
for _ = 1, tonumber(ARGV[6]) do
  local kind, id, json = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local records = KEYS[3 + tonumber(kind)]
  if json == '' then
    redis.call('HDEL', records, id)
  else
    redis.call('HSET', records, id, version .. ' ' .. json)
  end
  redis.call('ZADD', changes, version, kind .. ':' .. id)
  at = at + 3
end

-- Who has not looked since the floor reads everything.
local excess = redis.call('ZCARD', changes) - tonumber(ARGV[4])
if excess > 0 then
  local last = redis.call('ZRANGE', changes, excess - 1, excess - 1, 'WITHSCORES')
  redis.call('HSET', about, 'floor', last[2])
  redis.call('ZREMRANGEBYRANK', changes, 0, excess - 1)
end

for place = at, #ARGV do
  redis.call('XADD', audit, 'MAXLEN', '~', ARGV[5], version .. '-' .. (place - at), 'note', ARGV[place])
end
-- A server that does not allow it still has the change: everybody polls.
redis.pcall('PUBLISH', ARGV[3], version)
return version
