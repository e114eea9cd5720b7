-- Token buckets, counters of calendar quotas and leases of concurrency limits on the server. One call decides on many
-- requests, in order, at one time of the server's clock.
--
-- A bucket is one key. Its value is two decimal integers: the theoretical arrival time (nanoseconds since 1970; see
-- rate_limiter.py) and the budget (nanoseconds) under which it was written. A key expires when its bucket is full, not
-- earlier. Numbers in Lua are doubles, exact up to 2^53: enough for microseconds since 1970 and for nanoseconds from
-- now, but not for nanoseconds since 1970. So the script calculates with a bucket's debt from now on.
--
-- A counter is one key. Its value is fifteen integers, see `limits/quota_ops.py`; amounts are thousandths of a token,
-- times are seconds. The sixteenth, the number of resets, follows in letters (a is 0) if it is not 0: earlier releases,
-- which do not know it, read the digits alone. The script decides as `limits/period_counters.py` does. It has no
-- calendar: with each counter the caller gives the period that it expects to contain the server's time. If another
-- period is needed, or the client's first period began at another time than the caller knows, nothing is charged, and
-- the caller asks again.
--
-- A lease is how many requests of a key one worker has in flight; those of one key are one key here, see
-- `limits/concurrency_ops.py`. A worker that does not renew its lease is gone, and its requests with it: an expired lease
-- does not count. A lease has an epoch, which the worker raises when it does not know what became of an operation; from
-- then on earlier operations change nothing. A lease of no requests is kept until it ends: if there is none, it has ended
-- or was lost.
--
-- KEYS   the buckets, counters and leases
-- ARGV   a sequence of operations; a bucket is given by its number among KEYS, times are nanoseconds:
--          count, count * (bucket, budget, cost)    charge all of these buckets or none
--          "debt", bucket, budget, change, most     charge `change`, or as much of it as leaves a debt of `most`
--          "refund", bucket, budget, amount, end, channel, message
--                                                   refund what has not been refilled before `end`, and publish how much,
--                                                   the server's time in microseconds, and the message
--          "all", buckets, counters, buckets * (bucket, budget, cost), counters * COUNTER
--                                                   charge all of these buckets and counters or none
--          "correct", COUNTER, start                charge or refund (below 0) afterwards, in the period from `start`
--          "adjust", COUNTER, amount, until, carried, is_reset
--                                                   add a top-up, set what was carried over (-1: not), begin anew (1)
--          "slots", worker, milliseconds, count, count * (leases, epoch, known, limit)
--                                                   let the next charge pass only if fewer requests of each key are in
--                                                   flight, and count one more in the worker's leases if it passes
--          "return", worker, milliseconds, leases, epoch
--                                                   count one less
--          "hold", worker, milliseconds, leases, epoch, count
--                                                   set the worker's lease, unless it has this epoch or a later one
--          "renew", worker, milliseconds, leases, epoch, known
--          "held", leases
--        COUNTER is counter, unit, allowance, carry-over, start, end and earlier start of the period, begin (-1: of no
--        importance), cost.
-- Reply  the server's time in microseconds, then for each bucket of each operation except "debt" its debt before the
--        charge ("refund": what was refunded), and for each counter of "all" and "adjust" 1 if the caller must ask again,
--        else 0, and its value before ("adjust": afterwards), or -1 for each integer. The caller computes the decision
--        from these by the same rule. For each key of "slots" and "held": the requests in flight of all workers
--        before; of "slots" -1 if the worker's lease has another epoch, or has expired while `known` requests are in
--        flight. "return", "hold" and "renew": 1 if the lease has this epoch afterwards, else 0; of "renew" -1 if its number
--        is not the `known` one, unless that is -1.

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

local now_ms = math.floor(now / 1000)
local leases, leased = {}, {}
local claims, has_room = {}, true -- of the charge that follows

local function leases_of(number, milliseconds)
  if not leases[number] then
    local found, value = {}, redis.pcall('GET', KEYS[number])
    if type(value) == 'string' then
      for worker, epoch, count, ends in string.gmatch(value, '(%x+) (%d+) (%d+) (%d+)') do
        -- A later end is only possible after a clock step backwards.
        local lease = {epoch = tonumber(epoch), count = tonumber(count), ends = tonumber(ends)}
        if milliseconds and lease.ends > now_ms + milliseconds then
          lease.ends, leased[number] = now_ms + milliseconds, true
        end
        if lease.ends > now_ms then found[worker] = lease end
      end
    end
    leases[number] = found
  end
  return leases[number]
end

local function in_flight(found)
  local total = 0
  for _, lease in pairs(found) do total = total + lease.count end
  return total
end

local function set_lease(number, worker, milliseconds, epoch, count)
  leases[number][worker] = {epoch = epoch, count = count, ends = now_ms + milliseconds}
  leased[number] = true
end

local function claim(at)
  local worker, milliseconds, last = ARGV[at], tonumber(ARGV[at + 1]), at + 2 + 4 * ARGV[at + 2]
  for first = at + 3, last, 4 do
    local number, epoch = tonumber(ARGV[first]), tonumber(ARGV[first + 1])
    local found = leases_of(number, milliseconds)
    local own, known, total = found[worker], tonumber(ARGV[first + 2]), in_flight(found)
    local is_new = not own or own.count == 0 and own.epoch < epoch
    if is_new and known > 0 or not is_new and own.epoch ~= epoch then total = -1 end
    has_room = has_room and total >= 0 and total < tonumber(ARGV[first + 3])
    reply[#reply + 1] = total
    claims[#claims + 1] = {number, worker, milliseconds, epoch}
  end
  return last + 1
end

local function end_claims(passes)
  for _, one in ipairs(claims) do
    local own = leases[one[1]][one[2]]
    if passes then set_lease(one[1], one[2], one[3], one[4], (own and own.count or 0) + 1) end -- a new one has 0
  end
  claims, has_room = {}, true
end

local function change_lease(operation, at)
  local worker, milliseconds = ARGV[at], tonumber(ARGV[at + 1])
  local number, epoch = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local own = leases_of(number, milliseconds)[worker]
  local is_present = own and own.epoch == epoch
  if operation == 'hold' then
    local count = tonumber(ARGV[at + 4])
    if not own or own.epoch < epoch then
      set_lease(number, worker, milliseconds, epoch, count)
      is_present = true
    end
  elseif is_present then
    set_lease(number, worker, milliseconds, epoch, own.count - (operation == 'return' and 1 or 0))
  end
  reply[#reply + 1] = is_present and 1 or 0
  if operation == 'return' then return at + 4 end
  local known = tonumber(ARGV[at + 4])
  if operation == 'renew' and is_present and known >= 0 and known ~= own.count then reply[#reply] = -1 end
  return at + 5
end

local function take(at, count)
  local passes = has_room
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
  if claims[1] then end_claims(passes) end
  return at + 3 * count
end

local UNIT, BEGAN, START, USED, CARRIED, DRAWN, PEAK, END, BEFORE = 1, 2, 3, 4, 5, 6, 7, 8, 9
local BALANCE, UNTIL, RESETS = 14, 15, 16
local COUNT, FIELDS, ARGUMENTS = 5, 16, 9
local NEW, NEXT, BETWEEN = -1, -2, -3 -- counts that do not exist yet: of a new counter, the latest, the one before
local seconds = tonumber(time[1])
local counters, changed = {}, {}

local function counter_of(number)
  if counters[number] == nil then
    local fields, value = {}, redis.pcall('GET', KEYS[number])
    if type(value) == 'string' then
      for digits in string.gmatch(value, '%-?%d+') do fields[#fields + 1] = tonumber(digits) end
      local word = (string.byte(value, -1) or 0) > 57 and string.match(value, ' (%l+)$') or 'a' -- 57: the character 9
      fields[#fields + 1] = tonumber((string.gsub(word, '%l', function(l) return string.byte(l) - 97 end)))
    end
    counters[number] = #fields == FIELDS and fields or false
  end
  return counters[number]
end

local function question(at)
  local q = {}
  for index = 0, ARGUMENTS - 1 do q[index + 1] = tonumber(ARGV[at + index]) end
  return {counter = q[1], unit = q[2], allowance = q[3], carry = q[4], first = q[5], last = q[6], earlier = q[7],
    began = q[8], cost = q[9]}
end

local function carried(q, counter, last) -- what the count at `last` leaves to the period that is asked for
  local left = q.allowance
  if counter[last] == q.earlier then left = left + counter[last + 2] - counter[last + 1] end
  return math.min(math.max(left, 0), q.carry)
end

-- Returns the counter, the place of the count that is charged, and what is carried over to a new one; no place if the
-- caller must ask again.
local function resolve(q)
  local counter = counter_of(q.counter)
  if counter and counter[UNIT] ~= q.unit then counter = false end
  if counter and counter[START] <= seconds and seconds < counter[END] then return counter, START, 0 end
  if seconds < q.first or seconds >= q.last then return counter, nil, 0 end
  if not counter then return counter, NEW, 0 end
  if q.began >= 0 and q.began ~= counter[BEGAN] then return counter, nil, 0 end
  if q.first > counter[START] then return counter, NEXT, carried(q, counter, START) end
  if q.first == counter[START] or counter[BEFORE] < 0 then return counter, START, 0 end
  if q.first > counter[BEFORE] then return counter, BETWEEN, carried(q, counter, BEFORE) end
  return counter, BEFORE, 0
end

local function valid_balance(counter)
  return seconds < counter[UNTIL] and counter[BALANCE] or 0
end

local function left_of(q, counter, place, extra)
  local left = q.allowance + extra
  if place > 0 then left = left + counter[place + 2] - counter[place + 1] end
  if counter and counter[BALANCE] ~= 0 then left = math.max(left, 0) + valid_balance(counter) end
  return left
end

-- Makes a count a part of its counter; returns both.
local function attach(q, counter, place, extra)
  changed[q.counter] = true
  if place == NEW then
    counter = {q.unit, q.began >= 0 and q.began or seconds, q.first, 0, 0, 0, 0, q.last, -1, 0, 0, 0, 0, 0, 0, 0}
    counters[q.counter] = counter
    return counter, START
  elseif place == NEXT then
    for index = 0, COUNT - 1 do counter[BEFORE + index] = counter[START + index] end
    counter[START], counter[USED], counter[CARRIED], counter[DRAWN], counter[PEAK] = q.first, 0, extra, 0, 0
    counter[END] = q.last
    return counter, START
  elseif place == BETWEEN then
    for index = 1, COUNT - 1 do counter[BEFORE + index] = 0 end
    counter[BEFORE], counter[BEFORE + 2] = q.first, extra
    return counter, BEFORE
  end
  return counter, place
end

local function use(q, counter, place, cost)
  local free = math.max(q.allowance + counter[place + 2] - counter[place + 1], 0)
  if cost > free and counter[BALANCE] ~= 0 then
    local drawn = math.min(cost - free, valid_balance(counter))
    counter[BALANCE] = counter[BALANCE] - drawn
    counter[place + 3] = counter[place + 3] + drawn
    cost = cost - drawn
  end
  counter[place + 1] = counter[place + 1] + cost
  counter[place + 4] = math.max(counter[place + 4], counter[place + 1])
end

local function report(must_ask_again, counter)
  reply[#reply + 1] = must_ask_again and 1 or 0
  for index = 1, FIELDS do reply[#reply + 1] = counter and counter[index] or -1 end
end

local function take_all(at)
  local passes, buckets, last = has_room, tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local asked = {}
  local first_counter = at + 2 + 3 * buckets
  for first = at + 2, first_counter - 3, 3 do
    local budget = tonumber(ARGV[first + 1])
    local debt = load(tonumber(ARGV[first]), budget)
    reply[#reply + 1] = debt
    passes = passes and debt + ARGV[first + 2] <= budget
  end
  for index = 1, last do
    local q = question(first_counter + ARGUMENTS * (index - 1))
    local counter, place, extra = resolve(q)
    report(not place, counter)
    passes = passes and place and (q.cost == 0 or q.cost <= left_of(q, counter, place, extra))
    asked[index] = {q, counter, place, extra}
  end
  if passes then
    for first = at + 2, first_counter - 3, 3 do
      local bucket, cost = tonumber(ARGV[first]), tonumber(ARGV[first + 2])
      if cost > 0 then charge(bucket, debts[bucket] + cost) end
    end
    for _, one in ipairs(asked) do
      local q = one[1]
      if q.cost > 0 then
        local counter, place = attach(q, one[2], one[3], one[4])
        use(q, counter, place, q.cost)
      end
    end
  end
  if claims[1] then end_claims(passes) end
  return first_counter + ARGUMENTS * last
end

local function correct(at)
  local q, start = question(at), tonumber(ARGV[at + ARGUMENTS])
  local held = counter_of(q.counter)
  if held and held[UNIT] ~= q.unit then return at + ARGUMENTS + 1 end -- counts have begun anew since the charge
  local counter, place, extra = resolve(q)
  local kept = counter and (counter[START] == start and START or counter[BEFORE] == start and BEFORE)
  local charged = kept or place or (counter and START)
  if q.cost > 0 and charged then
    counter, place = attach(q, counter, charged, extra)
    local free = q.allowance + counter[place + 2] - counter[place + 1]
    use(q, counter, place, math.min(q.cost, math.max(free + q.allowance, 0) + valid_balance(counter)))
  elseif q.cost < 0 and kept then
    changed[q.counter] = true
    local drawn = math.min(-q.cost, counter[kept + 3])
    counter[kept + 3] = counter[kept + 3] - drawn
    if seconds < counter[UNTIL] then counter[BALANCE] = counter[BALANCE] + drawn end
    counter[kept + 1] = math.max(counter[kept + 1] + q.cost + drawn, 0)
  end
  return at + ARGUMENTS + 1
end

local function adjust(at)
  local q, after = question(at), at + ARGUMENTS
  local counter, place, extra = resolve(q)
  if place then
    counter, place = attach(q, counter, place, extra)
    local amount, ends, carry = tonumber(ARGV[after]), tonumber(ARGV[after + 1]), tonumber(ARGV[after + 2])
    if amount > 0 then
      local valid = valid_balance(counter)
      counter[UNTIL] = valid > 0 and math.max(ends, counter[UNTIL]) or ends
      counter[BALANCE] = valid + amount
    end
    if carry >= 0 then counter[place + 2] = carry end
    if ARGV[after + 3] == '1' then
      counter[place + 1], counter[place + 4], counter[RESETS] = 0, 0, counter[RESETS] + 1
    end
  end
  report(not place, counter)
  return after + 4
end

local function add(at)
  local bucket, budget, most = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 3])
  local debt = load(bucket, budget)
  charge(bucket, math.max(debt, math.min(debt + ARGV[at + 2], most)))
  return at + 4
end

local publications = {}

local function refund(at)
  local bucket, budget = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local debt = load(bucket, budget)
  local given = math.min(tonumber(ARGV[at + 2]), math.max(owed(ARGV[at + 3]), 0), debt)
  if given > 0 then
    charge(bucket, debt - given)
    publications[#publications + 1] = {ARGV[at + 4], string.format('%.0f %.0f %s', given, now, ARGV[at + 5])}
  end
  reply[#reply + 1] = given
  return at + 6
end

local at = 1
while at <= #ARGV do
  local operation = ARGV[at]
  if operation == 'debt' then
    at = add(at + 1)
  elseif operation == 'refund' then
    at = refund(at + 1)
  elseif operation == 'all' then
    at = take_all(at + 1)
  elseif operation == 'correct' then
    at = correct(at + 1)
  elseif operation == 'adjust' then
    at = adjust(at + 1)
  elseif operation == 'slots' then
    at = claim(at + 1)
  elseif operation == 'return' or operation == 'hold' or operation == 'renew' then
    at = change_lease(operation, at + 1)
  elseif operation == 'held' then
    reply[#reply + 1] = in_flight(leases_of(tonumber(ARGV[at + 1])))
    at = at + 2
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
for number in pairs(changed) do
  local counter, digits = counters[number], {}
  for index = 1, FIELDS do digits[index] = string.format('%.0f', counter[index]) end
  digits[RESETS] = string.gsub(digits[RESETS], '%d', function(d) return string.char(97 + d) end)
  if counter[RESETS] == 0 then digits[RESETS] = nil end
  local past = math.max(counter[END] + 2 * (counter[END] - counter[START]) + 86400, counter[UNTIL])
  redis.call('SET', KEYS[number], table.concat(digits, ' '),
    'PXAT', string.format('%.0f', math.max(past, seconds) * 1000 + 999)) -- to the end of that second
end
for number in pairs(leased) do
  local words, ends = {}, 0
  for worker, lease in pairs(leases[number]) do
    words[#words + 1] = string.format('%s %.0f %.0f %.0f', worker, lease.epoch, lease.count, lease.ends)
    ends = math.max(ends, lease.ends)
  end
  if ends > 0 then
    redis.call('SET', KEYS[number], table.concat(words, ' '), 'PXAT', string.format('%.0f', ends))
  else
    redis.call('DEL', KEYS[number])
  end
end
for _, one in ipairs(publications) do
  redis.call('PUBLISH', one[1], one[2])
end
return reply
