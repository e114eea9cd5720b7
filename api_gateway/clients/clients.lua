-- Makes one change of a client with the next version, and publishes it. Atomic; executed at most once.
--
-- KEYS  meta: hash of epoch and version; records: hash, id to JSON; changes: sorted set, id by version;
--       outcome: the outcome of this change, for a caller that has not received the reply; index: hash, digest of an
--       API key to id; uses: hash, digest of an API key to the time of its last use
-- ARGV  id, epoch (if the store has none yet), number of changes to keep, channel,
--       whether the tier is changed ('1' or ''), tier, whether the grant is changed ('1' or ''), granted tier, its end,
--       version that the record of an expired grant must have ('': no condition), the change of keys as JSON (''
--       for none; see `KeyChange` in records.py), verified_only ('': not changed, 'true', 'false', or 'null')
-- Reply {'made', record before or '', record after, epoch}; {'kept'} if the condition does not hold; or {'void'} if the
--       change has been cancelled.
local meta, records, changes, outcome, index, uses = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, spare_epoch, keep, channel = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local sets_tier, tier, sets_grant, grant, ends, ended_version, key_change, verified_only = unpack(ARGV, 5, 12)

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

-- The number of keys that have not expired at a time.
local function count_valid(keys, at)
  local count = 0
  for _, key in pairs(keys) do
    if not key.expires_at or at < key.expires_at then
      count = count + 1
    end
  end
  return count
end

-- The keys after a change, which may alter the given ones; nothing if it is refused, as by `KeyChange.refusal`.
local function changed(keys, asked)
  local after = {}
  if not asked.clear then
    for digest, key in pairs(keys) do
      after[digest] = key
    end
  end
  for _, digest in ipairs(asked.remove or {}) do
    after[digest] = nil
  end
  local digest, added = next(asked.add or {})
  if not added then
    return after
  end
  local most = math.max(asked.most, count_valid(keys, added.created_at))
  if asked.replaces then
    local old = after[asked.replaces.digest]
    if not old or old.replaced_by then
      return nil
    end
    old.replaced_by = asked.replaces.by
    if not (old.expires_at and old.expires_at <= asked.replaces['until']) then
      old.expires_at = asked.replaces['until']
    end
  end
  after[digest] = added
  return count_valid(after, added.created_at) <= most and after or nil
end

local asked = key_change ~= '' and cjson.decode(key_change)
local keys = record.keys or {}
local keys_after = asked and changed(keys, asked)
if asked and not keys_after then
  record = before and cjson.decode(before) or {}  -- nothing is changed
else
  if sets_tier == '1' then
    record.tier = tier ~= '' and tier or nil
  end
  if sets_grant == '1' then
    record.grant = grant ~= '' and grant or nil
    record.grant_until = tonumber(ends)
  end
  if verified_only ~= '' then
    record.verified_only = nil
    if verified_only ~= 'null' then
      record.verified_only = verified_only == 'true'
    end
  elseif asked and asked.add and record.verified_only == nil then
    record.verified_only = true
  end
end
if keys_after then
  for digest in pairs(keys) do
    if not keys_after[digest] then
      redis.call('HDEL', index, digest)
      redis.call('HDEL', uses, digest)
    end
  end
  for digest in pairs(keys_after) do
    if not keys[digest] then
      redis.call('HSET', index, digest, id)
    end
  end
  record.keys = next(keys_after) and keys_after or nil
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
  local is_bare = old and not old.tier and not old.keys and old.verified_only == nil
  if is_bare and (not old.grant or old.grant_until <= now) then
    redis.call('HDEL', records, other)
  end
  redis.call('ZREM', changes, other)
end
redis.call('SET', outcome, before or '', 'EX', 600)
redis.call('PUBLISH', channel, record.version)
return {'made', before or '', after, epoch}
