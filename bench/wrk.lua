-- POST bodies with changing entity ids for wrk: wrk ... -s wrk.lua URL -- FORM ENTITIES USERS [KEY]
-- FORM is `features` (columns of a feature service) or `rows` (entities to predict). Prints JSON at the end.

local bodies, at = {}, 0

local function ids(entities, users)
  local drawn = {}
  for i = 1, entities do drawn[i] = math.random(0, users - 1) end
  return drawn
end

local forms = {
  features = function(drawn)
    return '{"feature_service": "users", "entities": {"user_id": [' .. table.concat(drawn, ", ") .. "]}}"
  end,
  rows = function(drawn)
    for i = 1, #drawn do drawn[i] = '{"user_id": ' .. drawn[i] .. "}" end
    return '{"entities": [' .. table.concat(drawn, ", ") .. "]}"
  end,
}

function init(args)
  local form, entities, users, key = args[1], tonumber(args[2]), tonumber(args[3]), args[4]
  local headers = { ["Content-Type"] = "application/json" }
  if key then headers["Authorization"] = "Bearer " .. key end
  math.randomseed(7)
  for i = 1, 2000 do
    bodies[i] = wrk.format("POST", nil, headers, forms[form](ids(entities, users)))
  end
end

function request()
  at = at % #bodies + 1
  return bodies[at]
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p99_ms": %.4f, "max_ms": %.4f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
