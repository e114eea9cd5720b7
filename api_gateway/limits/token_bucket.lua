-- Token buckets on the server: one call decides for many requests, one after the other, at one moment of its clock.
--
-- A bucket is one key. Its value is two integers in decimal digits: the theoretical arrival time (nanoseconds since
-- 1970; see rate_limiter.py) and the budget (nanoseconds) under which it was written. A key expires when its bucket is
-- full, not a millisecond before. Numbers are doubles here, exact up to 2^53: that holds microseconds since 1970 and
-- nanoseconds from now, but not nanoseconds since 1970. So a bucket is handled as what it owes from now on.
--
-- KEYS   the buckets
-- ARGV   operations, one behind the other; a bucket is named by its number among KEYS, times are nanoseconds:
--          count, count * (bucket, budget, cost)    charge all of these buckets or none
--          "debt", bucket, budget, change           charge as much of `change` as leaves the bucket empty
--          "settle", bucket, budget, change, tat    charge later, or give back what of `tat` has not been refilled yet
--          "told", channel, message                 publish
-- Reply  the server's clock in microseconds, then for each bucket of each operation but "debt" and "told" what it
--        owed before it was charged ("settle": afterwards). The caller works out the decision from that by the same rule.

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
      else -- not of our writing: the bucket is empty now
        debt, written[bucket] = budget, true
      end
    end
  end
  if debt > 2 * written_under then -- more than can be owed: a clock stepped back. The bucket is empty now.
    debt, written[bucket] = written_under, true
  end
  if written_under ~= budget then -- another tier: the same share of the bucket stays filled
    local whole = debt % written_under == 0 -- else rounded up, and once more, for a double may have been rounded down
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
  local bucket, budget = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local debt = load(bucket, budget)
  charge(bucket, math.max(debt, math.min(debt + ARGV[at + 2], budget)))
  return at + 3
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

local told = {}
local at = 1
while at <= #ARGV do
  local operation = ARGV[at]
  if operation == 'debt' then
    at = add(at + 1)
  elseif operation == 'settle' then
    at = settle(at + 1)
  elseif operation == 'told' then
    told[#told + 1] = at
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
for _, first in ipairs(told) do
  redis.call('PUBLISH', ARGV[first + 1], ARGV[first + 2])
end
return reply
