-- One request of each address in turn, from the one that BENCH_FROM numbers, for control.py.
local number = tonumber(os.getenv("BENCH_FROM"))
wrk.method = "POST"
wrk.body = '{"model":"chat","messages":[{"role":"user","content":"Hi"}]}'
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-bench"

function request()
    number = number + 1
    wrk.headers["X-Forwarded-For"] =
        string.format("10.%d.%d.%d", math.floor(number / 65536) % 256, math.floor(number / 256) % 256, number % 256)
    return wrk.format()
end
