-- Makes one change of a client with the next version, and publishes it. Atomic; executed at most once.
--
-- KEYS  meta: hash of epoch and version; records: hash, id to JSON; changes: sorted set, id by version;
--       outcome: the outcome of this change, for a caller that has not received the reply
-- ARGV  id, epoch (if the store has none yet), number of changes to keep, channel,
--       whether the tier is changed ('1' or ''), tier, whether the grant is changed ('1' or ''), granted tier, its end,
--       version that the record of an expired grant must have ('': no condition)
-- Reply {'made', record before or '', record after, epoch}; {'kept'} if the condition does not hold; or {'void'} if the
--       change has been cancelled.
local meta, records, changes, outcome = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id, spare_epoch, keep, channel = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local sets_tier, tier, sets_grant, grant, ends, ended_version = unpack(ARGV, 5, 10)

if redis.call('EXISTS', outcome) == 1 then
  return {'void'}
end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local before = redis.call('HGET', records, id)
local record = before and cjson.decode(before) or {}
if ended_version ~= '' then
  if record.version ~= tonumber(ended_version) or not record.grant or record.grant_until > now then
    return {'kept'}
  end
end

if sets_tier == '1' then
  record.tier = tier ~= '' and tier or nil
end
if sets_grant == '1' then
  record.grant = grant ~= '' and grant or nil
  record.grant_until = tonumber(ends)
end
local epoch = redis.call('HGET', meta, 'epoch')
if not epoch then
  epoch = spare_epoch
  redis.call('HSET', meta, 'epoch', epoch)
end
record.version = redis.call('HINCRBY', meta, 'version', 1)
record.changed_at = now
local after = cjson.encode(record)
redis.call('HSET', records, id, after)
redis.call('ZADD', changes, record.version, id)

-- Drop changes that are too old to be read, and with them the records of removals and expired grants.
for _, other in ipairs(redis.call('ZRANGEBYSCORE', changes, '-inf', record.version - keep)) do
  local text = redis.call('HGET', records, other)
  local old = text and cjson.decode(text)
  if old and not old.tier and (not old.grant or old.grant_until <= now) then
    redis.call('HDEL', records, other)
  end
  redis.call('ZREM', changes, other)
end
redis.call('SET', outcome, before or '', 'EX', 600)
redis.call('PUBLISH', channel, record.version)
return {'made', before or '', after, epoch}
