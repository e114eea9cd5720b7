-- Token buckets on the server. One call decides on many requests, in order, at one time of the server's clock.
--
-- A bucket is one key. Its value is two decimal integers: the theoretical arrival time (nanoseconds since 1970; see
-- rate_limiter.py) and the budget (nanoseconds) under which it was written. A key expires when its bucket is full, not
-- earlier. Numbers in Lua are doubles, exact up to 2^53: enough for microseconds since 1970 and for nanoseconds from
-- now, but not for nanoseconds since 1970. So the script calculates with a bucket's debt from now on.
--
-- KEYS   the buckets
-- ARGV   a sequence of operations; a bucket is given by its number among KEYS, times are nanoseconds:
--          count, count * (bucket, budget, cost)    charge all of these buckets or none
--          "debt", bucket, budget, change, most     charge `change`, or as much of it as leaves a debt of `most`
--          "settle", bucket, budget, change, tat    charge afterwards, or refund what has not been refilled before `tat`
--          "publish", channel, message              publish the message
-- Reply  the server's time in microseconds, then for each bucket of each operation except "debt" and "publish" its debt
--        before the charge ("settle": afterwards). The caller computes the decision from these by the same rule.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local debts, budgets, written = {}, {}, {}

local function owed(digits)
  return (tonumber(string.sub(digits, 1, -4)) - now) * 1000 + tonumber(string.sub(digits, -3))
end

local function load(bucket, budget)
  local debt, written_under = debts[bucket], budgets[bucket]
  if not debt then
    local value = redis.pcall('GET', KEYS[bucket])
    debt, written_under = 0, budget
    if value then
      local digits, under
      if type(value) == 'string' then digits, under = string.match(value, '^(%d%d%d%d+) (%d+)$') end
      under = tonumber(under or 0)
      if under > 0 and under < 2 ^ 53 then
        debt, written_under = math.max(owed(digits), 0), under
      else -- invalid content: treat the bucket as empty
        debt, written[bucket] = budget, true
      end
    end
  end
  if debt > 2 * written_under then -- impossible debt, as after a clock step backwards: treat the bucket as empty
    debt, written[bucket] = written_under, true
  end
  if written_under ~= budget then -- another tier: keep the filled fraction
    local whole = debt % written_under == 0 -- else add 1, because the double may have been rounded down
    debt = debt / written_under * budget
    debt, written[bucket] = whole and debt or math.floor(debt) + 1, true
  end
  debts[bucket], budgets[bucket] = debt, budget
  return debt
end

local function charge(bucket, debt)
  debts[bucket] = debt
  written[bucket] = true
end

local reply = {now}

local function take(at, count)
  local passes = true
  for first = at, at + 3 * (count - 1), 3 do
    local budget = tonumber(ARGV[first + 1])
    local debt = load(tonumber(ARGV[first]), budget)
    reply[#reply + 1] = debt
    passes = passes and debt + ARGV[first + 2] <= budget
  end
  if passes then
    for first = at, at + 3 * (count - 1), 3 do
      local bucket, cost = tonumber(ARGV[first]), tonumber(ARGV[first + 2])
      if cost > 0 then charge(bucket, debts[bucket] + cost) end
    end
  end
  return at + 3 * count
end

local function add(at)
  local bucket, budget, most = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 3])
  local debt = load(bucket, budget)
  charge(bucket, math.max(debt, math.min(debt + ARGV[at + 2], most)))
  return at + 4
end

local function settle(at)
  local bucket, budget, change = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local debt = load(bucket, budget)
  if change >= 0 then
    charge(bucket, math.max(debt, math.min(debt + change, 2 * budget)))
  else
    charge(bucket, math.max(debt - math.min(-change, math.max(owed(ARGV[at + 3]), 0)), 0))
  end
  reply[#reply + 1] = debts[bucket]
  return at + 4
end

local publications = {}
local at = 1
while at <= #ARGV do
  local operation = ARGV[at]
  if operation == 'debt' then
    at = add(at + 1)
  elseif operation == 'settle' then
    at = settle(at + 1)
  elseif operation == 'publish' then
    publications[#publications + 1] = at
    at = at + 3
  else
    at = take(at + 1, tonumber(operation))
  end
end

for bucket in pairs(written) do
  local debt = debts[bucket]
  if debt > 0 then
    local whole = math.floor(debt / 1000)
    local full = now + math.ceil(debt / 1000)
    redis.call('SET', KEYS[bucket],
      string.format('%.0f%03.0f %.0f', now + whole, debt - whole * 1000, budgets[bucket]),
      'PXAT', string.format('%.0f', math.ceil(full / 1000)))
  else
    redis.call('DEL', KEYS[bucket])
  end
end
for _, first in ipairs(publications) do
  redis.call('PUBLISH', ARGV[first + 1], ARGV[first + 2])
end
return reply
