-- Calls in flight: a lease each, in a sorted set of the subject beside its hash.
--
-- A lease is a member of the set, scored by its end: life of the counter, number in it, amount, field. The sum of a
-- field's members is the score of the field itself, below zero, so that no time is taken for one.

local leases

-- Made only where such a limit is met: a function costs every decision that carries it.
local function with_leases()
    if leases then return leases end
    leases = {}

    local function whole(number) return string.format('%.0f', number) end

    function leases.member(c, life, number, amount)
        return whole(life) .. ' ' .. whole(number) .. ' ' .. whole(amount) .. ' ' .. c[FIELD]
    end

    local function amount_and_field(member)
        local amount, field = string.match(member, '^%d+ %d+ (%d+) (.+)$')
        return tonumber(amount), field
    end

    -- When the last of a field's leases ends. Mostly the last of all, because few subjects have two such fields.
    local function latest(set, field)
        local from, size = 0, 1
        while true do
            local found = redis.call('ZREVRANGE', set, from, from + size - 1, 'WITHSCORES')
            if #found == 0 then return 0 end
            for place = 1, #found, 2 do
                local _, of = amount_and_field(found[place])
                if of == field then return tonumber(found[place + 1]) end
            end
            from, size = from + size, 2 * size
        end
    end

    -- Counts live leases. Returns the state with their sum and the end of the last, as it was found; false if there is
    -- none. `c.leases` will say what becomes of which: a new end, or false. Dead ones of another field are its own
    -- affair, as its clock may be behind; litter are those that nobody came for in a day.
    function leases.count(c, now)
        local s, set = c.state, KEYS[c[SET]]
        c.leases, c.dead, c.litter = {}, {}, {}
        c.total = 0 - (redis.call('ZSCORE', set, c[FIELD]) or 0)
        if c.total > 0 then
            local dead = redis.call('ZRANGEBYSCORE', set, '(0', whole(math.max(s[AT], now)), 'WITHSCORES')
            for place = 1, #dead, 2 do
                local amount, field = amount_and_field(dead[place])
                if field == c[FIELD] then
                    c.dead[#c.dead + 1] = dead[place]
                    c.total = c.total - amount
                elseif tonumber(dead[place + 1]) <= now - LITTER_AGE then
                    c.litter[dead[place]] = field
                end
            end
        elseif not c.known then
            return false
        end
        local last = c.total > 0 and latest(set, c[FIELD]) or 0
        return cmsgpack.pack({ s[EXPIRY], s[LIFE], s[GENERATION], s[AT], s[LAST], c.total, last })
    end

    -- From the state's time on, for the full time.
    function leases.hold(c, member, amount)
        if amount == 0 then return end
        c.total = c.total + amount
        c.leases[member] = c.state[AT] + c[WINDOW]
    end

    -- Every live lease runs its full time from now.
    function leases.extend(c, now)
        for _, member in ipairs(c.dead) do c.leases[member] = false end
        for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[c[SET]], '(' .. whole(c.state[AT]), '+inf')) do
            local _, field = amount_and_field(member)
            if field == c[FIELD] then c.leases[member] = now + c[WINDOW] end
        end
    end

    -- Ends a lease, or holds it anew, also one that had run out. Returns what ended.
    function leases.release(c, life, number, amount, actual)
        local member = leases.member(c, life, number, amount)
        local ends = c.leases[member]
        if ends == nil then ends = tonumber(redis.call('ZSCORE', KEYS[c[SET]], member) or 0) end
        local held = ends and ends > c.state[AT] and amount or 0
        c.total, c.leases[member] = c.total - held, false
        leases.hold(c, member, actual)
        return held
    end

    -- Writes what became of leases, and drops dead ones. The set lives as long as the last of them.
    function leases.save(c, known, now)
        local set, total, longest, written = KEYS[c[SET]], whole(0 - c.total), 0, false
        if c.written then
            for _, member in ipairs(c.dead) do c.leases[member] = c.leases[member] or false end
            for member, field in pairs(c.litter) do
                if not known[field] then
                    local left = redis.call('ZINCRBY', set, (amount_and_field(member)), field)
                    redis.call('ZREM', set, member)
                    if left == '0' then redis.call('ZREM', set, field) end
                end
            end
        end
        for member, ends in pairs(c.leases) do
            if ends then
                redis.call('ZADD', set, whole(ends), member, total, c[FIELD])
                longest, written = math.max(longest, ends), true
            else
                redis.call('ZREM', set, member)
            end
        end
        if c.total == 0 then
            redis.call('ZREM', set, c[FIELD])
        elseif not written and next(c.leases) then
            redis.call('ZADD', set, total, c[FIELD])
        end
        if longest > 0 and now + redis.call('PTTL', set) < longest then
            redis.call('PEXPIREAT', set, whole(longest + math.floor((longest - now) / 8)))
        end
    end

    return leases
end

