-- Replaces what reservations took by what was used. A call in flight that keeps all of it still runs: its lease starts
-- anew. One that keeps nothing is over.
--
-- KEYS      a hash per subject, the set of leases of each that has calls in flight, and the key of the epoch
-- ARGV[1]   the counters, as in `load`
-- ARGV[2]   {life, settlements, epochs}; of each: its counter, the receipt (life, generation, amount, time, debt,
--           refunded, lease), and the actual amount; the rest as for charges. Of what an instance charges late also its
--           name and the numbers of these charges: what it has charged under this number or a later one stays as it is
-- Returns   the time, what each settlement gave back of calls in flight, or 1 for what was charged late before, and the
--           counters as they were found.

local counters, order = cmsgpack.unpack(ARGV[1]), cmsgpack.unpack(ARGV[2])

local function raised(value, by, bound) return max(min(value + by, bound), value) end

-- Charges unconditionally, up to a bound.
local function add_late(c, more)
    local s = c.state
    if c[ALGORITHM] == MOVING then
        log(c, raised(c.total, more, stop(c)) - c.total, s[AT])
    elseif c[ALGORITHM] == BUCKET then
        s[DEBT] = raised(s[DEBT], more * length(c), (c[BURST] + c[CAPACITY]) * length(c))
    else
        s[USED] = raised(s[USED], more, stop(c))
    end
end

-- Only into what it was taken from.
local function give_back(c, taken, debt, refunded, less)
    local s = c.state
    if c[ALGORITHM] == BUCKET then
        local ticks = (s[AT] - taken) / c[TICK]
        local drained = min(ticks, div_ceil(debt, c[CAPACITY])) * c[CAPACITY]
        local owed = max(0, max(0, debt - drained) - (s[REFUNDED] - refunded))
        local returned = min(less * length(c), owed, s[DEBT])
        s[DEBT], s[REFUNDED] = s[DEBT] - returned, s[REFUNDED] + returned
    elseif c[ALGORITHM] == MOVING then
        if s[AT] >= taken + c[WINDOW] then return end
        local place
        for entry = LOG, #s, 2 do
            if s[entry] == taken then
                place = entry
                break
            end
            if s[entry] == slot_end(c, taken) then place = entry end
        end
        if not place then return end
        local left = s[place + 1] - min(less, s[place + 1])
        c.total = c.total - s[place + 1] + left
        s[place + 1] = left
        if left == 0 then
            table.remove(s, place)
            table.remove(s, place)
        end
    else
        local window = index(c, taken)
        local count = window == s[INDEX] and USED
            or c[ALGORITHM] == SLIDING and window == s[INDEX] - 1 and PREVIOUS
        if count then s[count] = s[count] - min(less, s[count]) end
    end
end

local function correct(c, life, generation, amount, taken, debt, refunded, number, actual)
    local idle = c[ALGORITHM] ~= LEASES or c.total + actual == 0
    if not c.known and actual <= amount and idle then return 0 end
    local s = c.state
    if c[ALGORITHM] == BUCKET then
        -- At the terms of the last charge: settling does not bring back those of a limit changed since.
        c[CAPACITY], c[BURST], c[TICK] = s[OLD_CAPACITY], s[OLD_BURST], s[OLD_TICK]
    end
    refresh(c, now)
    renew(c)
    local ended = 0
    if c[ALGORITHM] == LEASES then
        ended = leases.release(c, life, number, amount, actual)
    elseif actual > amount then
        add_late(c, max(0, min(actual, stop(c)) - amount))
    elseif s[LIFE] == life and s[GENERATION] == generation then
        give_back(c, taken, debt, refunded, amount - actual)
    end
    c.known, c.written = true, true
    return ended
end

-- What an instance was to charge late last, beside EXPIRY: its number, and 1 if it was charged.
local NUMBER, CHARGED = 2, 3
local instance, numbers, records = order[4], order[5], {}

-- Says whether it was charged before. A counter is there from now on, charged or not, and so is the number: what arrives
-- later under it comes too late.
local function charge_once(c, number, settlement)
    local name = 'late:' .. instance .. ':' .. c[FIELD]
    local record = redis.call('HMGET', KEYS[c[KEY]], name)[1]
    record = record and cmsgpack.unpack(record)
    if record and record[NUMBER] >= number then return record[CHARGED] end
    correct(c, unpack(settlement))
    c.written = true
    local charged = settlement[#settlement] > 0 and 1 or 0
    records[#records + 1] = { KEYS[c[KEY]], name, cmsgpack.pack({ expiry(c), number, charged }) }
    return 0
end

local reply = load(counters, now, order[1], order[3])
local settlements, ended = order[2], {}
for at = 1, #settlements, 9 do
    local c = counters[settlements[at]]
    if instance then
        ended[#ended + 1] = charge_once(c, numbers[#ended + 1], { unpack(settlements, at + 1, at + 8) })
    else
        ended[#ended + 1] = correct(c, unpack(settlements, at + 1, at + 8))
    end
end
save(counters, now)
for _, record in ipairs(records) do redis.call('HSET', unpack(record)) end
table.insert(reply, 1, ended)
table.insert(reply, 1, now)
return reply
