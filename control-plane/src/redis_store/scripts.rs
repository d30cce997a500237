//! What must happen as one in Redis. Each script touches keys of one slot only, unless it says otherwise.

/// Appends changes to the log of a control plane, if they follow on what is there, so that a log has no gaps
/// whoever fills it.
///
/// KEYS\[1\]: the log. ARGV\[1\]: the number of the change before the first, 0 if there is none; then the number and
/// the sealed change, for each. Returns the number of the last one given; 0 if they do not follow, and nothing was
/// appended. What is there with that number need not be this change: whoever finds out looks at it.
pub const APPEND: &str = "
local last = 0
local found = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
if found[1] then last = tonumber(string.match(found[1][1], '^(%d+)')) end
if last ~= tonumber(ARGV[1]) then return 0 end
for i = 2, #ARGV, 2 do
  redis.call('XADD', KEYS[1], ARGV[i] .. '-0', 'c', ARGV[i + 1])
  last = tonumber(ARGV[i])
end
return last";

/// A function for other scripts: the type of a key, its text and the digest of that. Of a set the text is the JSON of
/// its members in order.
macro_rules! digest_of {
    () => {
        "
local function digest_of(key)
  local kind = redis.call('TYPE', key).ok
  if kind == 'string' then
    local text = redis.call('GET', key)
    return kind, text, redis.sha1hex(text)
  end
  if kind == 'set' then
    local members = redis.call('SMEMBERS', key)
    table.sort(members)
    local text = cjson.encode(members)
    return kind, text, redis.sha1hex(text)
  end
  return kind, '', kind
end
"
    };
}

/// Looks at a key that operators may edit, and at what was written to it last.
///
/// KEYS\[1\]: the key. KEYS\[2\]: its `written` hash. Returns the key's type, its text if it is one (of a set, the JSON
/// of its members in order), its TTL in
/// milliseconds (-1: none), the digest of what stands there, and of the hash the stamp, the digest and the end
/// (Unix milliseconds, 0: none), each an empty text if it is missing; then Redis's time in milliseconds.
pub const LOOK: &str = concat!(
    digest_of!(),
    "
local kind, text, digest = digest_of(KEYS[1])
local written = redis.call('HMGET', KEYS[2], 'stamp', 'digest', 'until')
local time = redis.call('TIME')
return {kind, text, redis.call('PTTL', KEYS[1]), digest,
  written[1] or '', written[2] or '', written[3] or '',
  tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)}"
);

/// Takes an edit for one control plane to deal with, if it still stands there as it was seen: one that another has
/// dealt with meanwhile is over.
///
/// KEYS\[1\]: the key. KEYS\[2\]: its `written` hash. KEYS\[3\]: who deals with it. ARGV\[1\]: the digest seen.
/// ARGV\[2\]: the stamp seen, empty: none. ARGV\[3\]: who asks. ARGV\[4\]: for how long, in milliseconds. Returns 1
/// if it is taken.
pub const CLAIM: &str = concat!(
    digest_of!(),
    "
local _, _, digest = digest_of(KEYS[1])
local stamp = redis.call('HGET', KEYS[2], 'stamp') or ''
if digest ~= ARGV[1] or stamp ~= ARGV[2] then return 0 end
if redis.call('SET', KEYS[3], ARGV[3], 'NX', 'PX', ARGV[4]) then return 1 end
return 0"
);

/// Writes a key that operators may edit, unless it was changed since it was looked at. Whoever deals with an edit
/// of it is through with that.
///
/// KEYS\[1\]: the key. KEYS\[2\]: its `written` hash. KEYS\[3\]: who deals with an edit. ARGV\[1\]: the digest seen.
/// ARGV\[2\]: the text, empty: none. ARGV\[3\]: its end in Unix milliseconds, 0: none. ARGV\[4\]: the stamp.
/// ARGV\[5\]: who asks. ARGV\[6\]: `set` when the text is the JSON of a set's members. Returns 1 if it was written.
pub const PUT: &str = concat!(
    digest_of!(),
    "
local function digest()
  local _, _, digest = digest_of(KEYS[1])
  return digest
end
if redis.call('GET', KEYS[3]) == ARGV[5] then redis.call('DEL', KEYS[3]) end
if digest() ~= ARGV[1] then return 0 end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[1])
elseif ARGV[6] == 'set' then
  redis.call('DEL', KEYS[1])
  for _, member in ipairs(cjson.decode(ARGV[2])) do redis.call('SADD', KEYS[1], member) end
elseif ARGV[3] == '0' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[2], 'PXAT', ARGV[3])
end
redis.call('HSET', KEYS[2], 'stamp', ARGV[4], 'digest', digest(), 'until', ARGV[3])
return 1"
);

/// Notes a revocation in both of its places. Not for a cluster, where they are in different slots.
///
/// KEYS\[1\]: `revoked:<jti>`. KEYS\[2\]: `revoked_bloom`. ARGV\[1\]: the jti. ARGV\[2\]: JSON. ARGV\[3\]: until
/// when, Unix seconds.
pub const REVOKE: &str = "
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('SET', KEYS[1], ARGV[2], 'EXAT', ARGV[3])";

/// Takes or renews a lease. The fencing token rises each time the work changes hands.
///
/// KEYS\[1\]: who has it. KEYS\[2\]: the fencing token. ARGV\[1\]: who asks. ARGV\[2\]: for how long, in
/// milliseconds. Returns the token, 0 if another has it.
pub const LEASE: &str = "
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if holder then return tonumber(redis.call('GET', KEYS[2]) or redis.call('INCR', KEYS[2])) end
return redis.call('INCR', KEYS[2])";

/// Gives a lease back. The fencing token stays.
///
/// KEYS\[1\]: who has it. ARGV\[1\]: who gives it back. Returns 1 if it had it.
pub const RELEASE: &str = "
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])";
