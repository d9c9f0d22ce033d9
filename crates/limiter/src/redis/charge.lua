-- One decision, or several one after the other, over the same set of charges.
--
-- KEYS      a hash per subject, the set of leases of each that has calls in flight, and the key of the epoch
-- ARGV[1]   the set: {counters, charges}; a counter as in `load`; of a charge, its counter and 1 if it is a shadow
-- ARGV[2]   {life, amounts, epochs}: what a state born now is known by; one amount per charge, request after request; the
--           place of the epoch's key
-- ARGV[#]   what tells the runs of this server apart, and this server from others
-- Returns   the time, '1' or '0' per request, and the counters as they were found. No request: only looks.

local set, order = cmsgpack.unpack(ARGV[1]), cmsgpack.unpack(ARGV[2])
local counters, charges = set[1], set[2]

local function fits(c, amount)
    local s, capacity = c.state, c[CAPACITY]
    if c[ALGORITHM] == FIXED then return s[USED] + amount <= capacity end
    if c.total then return c.total + amount <= capacity end
    local window = length(c)
    if c[ALGORITHM] == BUCKET then
        return amount <= c[BURST] and s[DEBT] + amount * window <= c[BURST] * window
    end
    local room = capacity - s[USED] - amount
    return room >= 0 and s[PREVIOUS] * (window - elapsed(c, s[AT])) <= room * window
end

local function take(c, amount)
    local s = c.state
    renew(c)
    if c[ALGORITHM] == MOVING then
        log(c, amount, s[AT])
    elseif c[ALGORITHM] == BUCKET then
        s[DEBT] = s[DEBT] + amount * length(c)
    elseif c[ALGORITHM] == LEASES then
        s[LAST] = s[LAST] + 1
        leases.hold(c, leases.member(c, s[LIFE], s[LAST], amount), amount)
    else
        s[USED] = s[USED] + amount
    end
    c.written = true
end

-- Every charge, or none. A charge needs room for itself and for the earlier ones on its counter.
local function decide(amounts, first)
    local needed, fit = {}, {}
    for number = 1, #charges / 2 do
        local c, shadow = counters[charges[2 * number - 1]], charges[2 * number] == 1
        needed[c] = (needed[c] or 0) + amounts[first + number]
        fit[number] = fits(c, needed[c])
        if not fit[number] and not shadow then return 0 end
    end
    for number = 1, #charges / 2 do
        if fit[number] then take(counters[charges[2 * number - 1]], amounts[first + number]) end
    end
    return 1
end

local reply = load(counters, now, order[1], order[3])
local verdicts, amounts = {}, order[2]
if #amounts > 0 then
    for _, c in ipairs(counters) do refresh(c, now) end
    for first = 0, #amounts - 1, #charges / 2 do verdicts[#verdicts + 1] = decide(amounts, first) end
    save(counters, now)
end
table.insert(reply, 1, table.concat(verdicts))
table.insert(reply, 1, now)
return reply
