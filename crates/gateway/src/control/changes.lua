-- What has changed since a version.
--
-- KEYS  as in change.lua
-- ARGV  version seen, epoch seen, most rows to tell
-- Gives version, epoch and one word: `nothing` (there is no control data), `same`, `all` (read everything), or
-- `some`, followed by kind, id and "version json" ('' where it is gone) of each row.
local about, changes = KEYS[1], KEYS[2]
local found = redis.call('HMGET', about, 'version', 'epoch', 'floor')
if not found[1] then return { '0', '', 'nothing' } end
local version, epoch, floor = tonumber(found[1]), found[2] or '', tonumber(found[3] or '0')
local seen = tonumber(ARGV[1])
if epoch ~= ARGV[2] or seen > version or seen < floor then return { found[1], epoch, 'all' } end
if seen == version then return { found[1], epoch, 'same' } end
local since = '(' .. ARGV[1]
if redis.call('ZCOUNT', changes, since, '+inf') > tonumber(ARGV[3]) then return { found[1], epoch, 'all' } end
local told = { found[1], epoch, 'some' }
for _, member in ipairs(redis.call('ZRANGEBYSCORE', changes, since, '+inf')) do
  local kind, id = string.match(member, '^(%d+):(.*)$')
  -- Kinds of a later version of the program are nothing to who asks.
  local records = KEYS[3 + tonumber(kind)]
  if records then
    told[#told + 1] = kind
    told[#told + 1] = id
    told[#told + 1] = redis.call('HGET', records, id) or ''
  end
end
return told
