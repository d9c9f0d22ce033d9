-- Says that there is control data again, after its rows were written by someone who still knew them.
--
-- KEYS  about
-- ARGV  version, epoch, channel
-- Gives 1, or 0 when somebody else did.
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'epoch', ARGV[2], 'floor', ARGV[1])
redis.pcall('PUBLISH', ARGV[3], ARGV[1])
return 1
