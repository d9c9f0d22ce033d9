-- Makes good what a server has lost: charges counters up to what was seen of them before.
--
-- A counter that was born since, in another epoch, is charged on top of what it was charged meanwhile, and only what it
-- was not healed by already: several who saw the same heal it once. One that is still the same is raised to what was
-- seen, unless this very server has shown it since it became a master: whatever it says otherwise by now happened since.
-- One that was born since, in the same epoch, was cleared: it stays so.
--
-- KEYS      a hash per subject, and the key of the epoch
-- ARGV[1]   the counters, as in `load`
-- ARGV[2]   {life, seen, epochs}; of each that was seen: its counter, the units in use by now, when it was seen, its
--           life, and who has shown it, or 0; the rest as for charges
-- ARGV[#-1] who this is: what tells this server's time as a master from any other, or 0
-- ARGV[#]   as for charges
-- Returns   by what life each counter is known now

local counters, order = cmsgpack.unpack(ARGV[1]), cmsgpack.unpack(ARGV[2])

-- As much as the counter says, in its own measure: units, of a bucket debt.
local function measured(c)
    local s = c.state
    if c[ALGORITHM] == MOVING then return c.total end
    if c[ALGORITHM] == BUCKET then return s[DEBT] end
    if c[ALGORITHM] == FIXED then return s[USED] end
    return s[USED] + div_ceil(min(s[PREVIOUS], stop(c)) * (length(c) - elapsed(c, s[AT])), length(c))
end

-- A record, beside EXPIRY, LIFE and AT.
local HEALED = 3

-- As much as it was healed by. Of a bucket that drains, like debt.
local function healed(c, name)
    local s, packed = c.state, redis.call('HMGET', KEYS[c[KEY]], name)[1]
    local record = packed and cmsgpack.unpack(packed)
    if not record or record[LIFE] ~= s[LIFE] then return 0 end
    if c[ALGORITHM] ~= BUCKET then return record[HEALED] end
    return max(0, record[HEALED] - floor(max(0, s[AT] - record[AT]) / c[TICK]) * c[CAPACITY])
end

local records = {}

local this = tonumber(ARGV[#ARGV - 1])

local function heal(c, amount, seen, life, shown)
    local s = c.state
    local same = s[LIFE] == life
    if same and shown == this and this > 0 then return end
    local now_in, seen_in = floor(s[LIFE] / LIVES), floor(life / LIVES)
    if not same and (now_in == seen_in or now_in == 0 or seen_in == 0) then return end
    if c[ALGORITHM] == FIXED and index(c, seen) ~= index(c, now) then return end
    if c[ALGORITHM] == BUCKET then
        -- At the terms of the last charge, as settlements are.
        c[CAPACITY], c[BURST], c[TICK] = s[OLD_CAPACITY], s[OLD_BURST], s[OLD_TICK]
    end
    refresh(c, now)
    renew(c)
    local name = 'healed:' .. c[FIELD]
    local target = c[ALGORITHM] == BUCKET and amount * length(c) or amount
    local more = target - (same and measured(c) or healed(c, name))
    if more <= 0 then return end
    if c[ALGORITHM] == MOVING then
        log(c, max(0, min(c.total + more, stop(c)) - c.total), min(seen, now))
    elseif c[ALGORITHM] == BUCKET then
        s[DEBT] = max(s[DEBT], min(s[DEBT] + more, (c[BURST] + c[CAPACITY]) * length(c)))
    else
        s[USED] = max(s[USED], min(s[USED] + more, stop(c)))
    end
    c.written = true
    if not same then
        records[#records + 1] = { KEYS[c[KEY]], name, cmsgpack.pack({ expiry(c), s[LIFE], target, s[AT] }) }
    end
end

load(counters, now, order[1], order[3])
local all, lives = order[2], {}
for at = 1, #all, 5 do
    local c = counters[all[at]]
    heal(c, all[at + 1], all[at + 2], all[at + 3], all[at + 4])
    lives[#lives + 1] = c.state[LIFE]
end
save(counters, now)
for _, record in ipairs(records) do redis.call('HSET', unpack(record)) end
return lives
