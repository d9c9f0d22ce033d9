-- What both scripts share: the definition (src/spec) said again, over the same whole numbers.
-- Every product of numbers that is compared stays below 2^53, or only its being larger matters.

local floor, min, max = math.floor, math.min, math.max

-- Names in capitals are replaced by their numbers before a server sees this: a function would carry each of them along,
-- for every decision anew.

-- A counter, as the request describes it: where it is, and the terms of its limit.
-- Of a limit on calls in flight, where its leases are, too.
local KEY, FIELD, ALGORITHM, CAPACITY, BURST, TICK, WINDOW, OFFSET, CALENDAR, SET = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
local FIXED, SLIDING, MOVING, BUCKET, LEASES = 0, 1, 2, 3, 4
-- A state, as it is stored. What follows depends on the algorithm; of a moving window, pairs of time and amount.
local EXPIRY, LIFE, GENERATION, AT = 1, 2, 3, 4
local INDEX, USED, PREVIOUS = 5, 6, 7
local LOG = 5
local DEBT, REFUNDED, OLD_CAPACITY, OLD_BURST, OLD_TICK = 5, 6, 7, 8, 9
local LAST = 5

-- A life is numbered: its epoch times LIVES, and what the caller gave it.
local LIVES, EPOCHS = 4294967296, 2097151

local EXACT = 4503599627370496
local COUNT_MAX = 9007199254740991
local EXACT_ENTRIES = 64
local SPARE_FIELDS = 4
local LITTER_AGE = 86400000

local function round_up(a, b)
    local rest = a % b
    if rest == 0 then return a end
    return a - rest + b
end

local function div_ceil(a, b) return floor(round_up(a, b) / b) end

-- The number of the window that contains `at`; of a calendar month, months since January 1970.
local function index(c, at)
    if c[CALENDAR] == 0 then return floor((at + c[OFFSET]) / c[WINDOW]) end
    local days = floor(at / 86400000) + 719468
    local era, day = floor(days / 146097), days % 146097
    local year = floor((day - floor(day / 1460) + floor(day / 36524) - floor(day / 146096)) / 365)
    local of_year = day - (365 * year + floor(year / 4) - floor(year / 100))
    return (era * 400 + year) * 12 + floor((5 * of_year + 2) / 153) + 2 - 23640
end

local function length(c) return c[WINDOW] / c[TICK] end

local function elapsed(c, at) return floor((at + c[OFFSET]) % c[WINDOW] / c[TICK]) end

local function stop(c) return 2 * max(c[CAPACITY], c[BURST]) end

local function slot_end(c, time)
    local slots = c[WINDOW] <= 60000 and 60 or 96
    return round_up(time, div_ceil(c[WINDOW], slots))
end

local function newborn(c, life)
    if c[ALGORITHM] == FIXED then return { 0, life, 0, 0, 0, 0 } end
    if c[ALGORITHM] == SLIDING then return { 0, life, 0, 0, 0, 0, 0 } end
    if c[ALGORITHM] == MOVING then return { 0, life, 0, 0 } end
    if c[ALGORITHM] == LEASES then return { 0, life, 0, 0, 0 } end
    return { 0, life, 0, 0, 0, 0, c[CAPACITY], c[BURST], c[TICK] }
end

-- When nothing can be in use any more.
local function expiry(c)
    local s = c.state
    local span = c[WINDOW]
    if c[ALGORITHM] == SLIDING then
        span = 2 * span
    elseif c[ALGORITHM] == MOVING then
        return max(s[AT], s[#s - 1]) + span
    elseif c[ALGORITHM] == BUCKET then
        span = (1 + div_ceil(c[BURST], c[CAPACITY])) * span + c[TICK]
    end
    return s[AT] + min(span, EXACT)
end

local function level(s)
    local sum = 0
    for place = LOG + 1, #s, 2 do sum = sum + s[place] end
    return sum
end

-- A state from more than one window ahead comes back to the clock with its level kept.
local function redate(c, now)
    local s = c.state
    if s[AT] <= now + c[WINDOW] then return false end
    local at = now
    if c[ALGORITHM] == FIXED then
        s[INDEX] = index(c, now)
    elseif c[ALGORITHM] == SLIDING then
        local share = min(s[PREVIOUS], stop(c)) * (length(c) - elapsed(c, s[AT]))
        s[USED] = min(s[USED] + div_ceil(share, length(c)), COUNT_MAX)
        s[INDEX], s[PREVIOUS] = index(c, now), 0
    elseif c[ALGORITHM] == MOVING then
        local kept = level(s)
        for place = #s, LOG, -1 do s[place] = nil end
        if kept > 0 then s[LOG], s[LOG + 1] = now, kept end
    elseif c[ALGORITHM] == BUCKET then
        at = now - now % s[OLD_TICK]
    else
        leases.extend(c, now)
    end
    s[AT], s[GENERATION] = at, s[GENERATION] + 1
    return true
end

-- Forgets the entries whose window has passed.
local function forget(c, at)
    local s, first = c.state, LOG
    while s[first] and s[first] + c[WINDOW] <= at do first = first + 2 end
    if first > LOG then
        local last, gap = #s, first - LOG
        for place = first, last do s[place - gap] = s[place] end
        for place = last - gap + 1, last do s[place] = nil end
    end
    c.total = level(s)
end

-- A bucket in the terms of the limit as it is now, and what time has drained.
local function drain(c, now)
    local s = c.state
    local tick = c[TICK]
    if tick > s[OLD_TICK] then
        s[DEBT], s[AT] = div_ceil(s[DEBT], tick / s[OLD_TICK]), round_up(s[AT], tick)
    elseif tick < s[OLD_TICK] then
        s[DEBT], s[AT] = s[DEBT] * (s[OLD_TICK] / tick), s[AT] + s[OLD_TICK]
    end
    if s[OLD_CAPACITY] ~= c[CAPACITY] or s[OLD_BURST] ~= c[BURST] or s[OLD_TICK] ~= tick then
        s[OLD_CAPACITY], s[OLD_BURST], s[OLD_TICK] = c[CAPACITY], c[BURST], tick
        c.renewed = true
    end
    s[DEBT] = min(s[DEBT], (c[BURST] + c[CAPACITY]) * length(c))
    local reached = max(s[AT], now - now % tick)
    local ticks = (reached - s[AT]) / tick
    s[DEBT] = max(0, s[DEBT] - min(ticks, div_ceil(s[DEBT], c[CAPACITY])) * c[CAPACITY])
    s[AT] = reached
end

-- Lets the time pass that has passed.
local function refresh(c, now)
    local s = c.state
    if c[ALGORITHM] == BUCKET then return drain(c, now) end
    local at = max(s[AT], now)
    s[AT] = at
    if c[ALGORITHM] == MOVING then return forget(c, at) end
    if c[ALGORITHM] == LEASES then return end
    local window = index(c, at)
    if window <= s[INDEX] then return end
    if c[ALGORITHM] == SLIDING then s[PREVIOUS] = window == s[INDEX] + 1 and s[USED] or 0 end
    s[INDEX], s[USED] = window, 0
end

-- What was taken from a bucket before can no longer be given back.
local function renew(c)
    local s = c.state
    if c[ALGORITHM] == BUCKET and (c.renewed or s[DEBT] == 0 or s[REFUNDED] >= EXACT) then
        s[GENERATION], s[REFUNDED], c.renewed = s[GENERATION] + 1, 0, nil
    end
end

local function log(c, amount, time)
    local s = c.state
    if amount == 0 then return end
    c.total = c.total + amount
    local place = #s - 1
    while place >= LOG and s[place] > time do place = place - 2 end
    if place >= LOG and s[place] == time then
        s[place + 1] = s[place + 1] + amount
    else
        table.insert(s, place + 2, time)
        table.insert(s, place + 3, amount)
    end
    if #s - LOG + 1 <= 2 * EXACT_ENTRIES then return end
    local kept, last = LOG - 2, #s
    for from = LOG, last, 2 do
        local time, entry = slot_end(c, s[from]), s[from + 1]
        if kept >= LOG and s[kept] == time then
            s[kept + 1] = s[kept + 1] + entry
        else
            kept = kept + 2
            s[kept], s[kept + 1] = time, entry
        end
    end
    for spare = kept + 2, last do s[spare] = nil end
end

-- Of counters born now: what is written down of their epoch, what will be if nothing is, and where.
local epoch, first_epoch, epochs

-- Reads the counters, which are in the order of their keys. Returns them as they were found; of one that is not there,
-- the epoch that it is born in: what the epoch's key says, moved on by what tells this server's runs apart. Only then
-- is that key read: whatever is there was not lost. `life` is what the caller gives to what is born now, `written` the
-- place of the epoch's key, 0 where there is none.
local function load(counters, now, life, written)
    local found, place, born = {}, 1, nil
    epochs, first_epoch = written, life % EPOCHS
    while place <= #counters do
        local key, first, fields = counters[place][KEY], place, {}
        while counters[place] and counters[place][KEY] == key do
            fields[#fields + 1] = counters[place][FIELD]
            place = place + 1
        end
        local packed = redis.call('HMGET', KEYS[key], unpack(fields))
        for number = 1, #fields do
            local c, text = counters[first + number - 1], packed[number]
            c.known = text and true or false
            if not text and not born then
                born = 0
                if epochs > 0 then
                    epoch = tonumber(redis.call('HMGET', KEYS[epochs], 'epoch')[1]) or first_epoch
                    born = (epoch + ARGV[#ARGV]) % EPOCHS + 1
                end
            end
            c.state = text and cmsgpack.unpack(text) or newborn(c, born * LIVES + life)
            found[#found + 1] = c[ALGORITHM] == LEASES and with_leases().count(c, now) or text or born
            if redate(c, now) then
                c.state[EXPIRY] = expiry(c)
                c.redated = cmsgpack.pack(c.state)
            end
        end
    end
    return found
end

-- Deletes the fields of limits that are no more, once nothing can be in use in them.
local function sweep(key, known, now)
    local all = redis.call('HGETALL', key)
    for place = 1, #all, 2 do
        if not known[all[place]] and cmsgpack.unpack(all[place + 1])[EXPIRY] <= now then
            redis.call('HDEL', key, all[place])
        end
    end
end

-- Writes the counters that changed. The key lives as long as any field that was written to it, and that of the epoch as
-- long as any key.
local function save(counters, now)
    local place = 1
    while place <= #counters do
        local key, latest, known, count, changed, held = counters[place][KEY], 0, {}, 0, {}, {}
        while counters[place] and counters[place][KEY] == key do
            local c = counters[place]
            known[c[FIELD]], count = true, count + 1
            local packed = c.redated
            if c.written then
                local last = expiry(c)
                if last > c.state[EXPIRY] then
                    -- A little later than needed, so that the next writes need not move it.
                    last = last + floor((last - now) / 8)
                    c.state[EXPIRY], latest = last, max(latest, last)
                end
                packed = cmsgpack.pack(c.state)
            end
            if packed then
                changed[#changed + 1] = c[FIELD]
                changed[#changed + 1] = packed
                if c.leases then held[#held + 1] = c end
            end
            place = place + 1
        end
        if #changed > 0 then
            local name = KEYS[key]
            local born = redis.call('HSET', name, unpack(changed))
            if latest > 0 and now + redis.call('PTTL', name) < latest then
                redis.call('PEXPIREAT', name, string.format('%.0f', latest))
                local left = epochs > 0 and redis.call('PTTL', KEYS[epochs])
                if left == -2 then
                    redis.call('HSET', KEYS[epochs], 'epoch', epoch or first_epoch)
                end
                if left and now + left < latest then
                    redis.call('PEXPIREAT', KEYS[epochs], string.format('%.0f', latest))
                end
            end
            -- After what a full server refuses: half of a decision is none.
            for _, c in ipairs(held) do leases.save(c, known, now) end
            if born > 0 and redis.call('HLEN', name) > count + SPARE_FIELDS then sweep(name, known, now) end
        end
    end
end
