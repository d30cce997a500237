# shellcheck shell=bash
# Functions shared by the scripts. Sourced, never run.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
CACHE=${KEYGATE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/keygate}
STATE=$ROOT/.keygate
LOGS=$STATE/logs
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

ENVOY_VERSION=1.40.0
WASM_TARGET=wasm32-wasip1
KEYGATE=$TARGET/debug/keygate
UPSTREAM=$TARGET/debug/demo-upstream
FILTER=$TARGET/$WASM_TARGET/filter/keygate_filter.wasm
MODULE=$TARGET/module/libkeygate_filter.so

TOOLS=$CACHE/tools-$(sha256sum "$ROOT/scripts/tools.txt" | cut -c1-8)

# Which compiler makes the filter: `rustup`, or `debian` where rustup cannot fetch the target.
WASM_TOOLCHAIN_FILE=$CACHE/wasm-toolchain

# A cargo that rustup installed a minute ago is not yet on the caller's PATH.
if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then
  export PATH="$HOME/.cargo/bin:$PATH"
fi

# --- speaking -------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }
note() { printf '%s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Prints the comment at the top of the calling script, which is its help.
help_of() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# --- versions and tools ---------------------------------------------------------------------------

# version_at_least 1.40.0 1.39.2 fails
version_at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$1" ]; }

# Prints the Envoy to use: one on PATH that is new enough, else the cached one.
find_envoy() {
  local found version
  if [ -n "${KEYGATE_ENVOY:-}" ]; then
    [ -x "$KEYGATE_ENVOY" ] || die "KEYGATE_ENVOY is '$KEYGATE_ENVOY', which is no program"
    printf '%s\n' "$KEYGATE_ENVOY"
    return 0
  fi
  if found=$(command -v envoy); then
    version=$("$found" --version 2>/dev/null | grep -oE '/[0-9]+\.[0-9]+\.[0-9]+' | head -n1 || true)
    if [ -n "$version" ] && version_at_least "$ENVOY_VERSION" "${version#/}"; then
      printf '%s\n' "$found"
      return 0
    fi
  fi
  found=$CACHE/envoy-$ENVOY_VERSION/envoy/_bin/envoy
  [ -x "$found" ] && printf '%s\n' "$found"
}

# Prints the path of a subcommand of cargo that the tests need: one on PATH, else the one that scripts/setup downloads.
find_tool() {
  command -v "$1" && return
  [ -x "$TOOLS/bin/$1" ] && printf '%s\n' "$TOOLS/bin/$1"
}

# Cargo for the filter's target, whichever compiler has it.
wasm_cargo() {
  if [ "$(cat "$WASM_TOOLCHAIN_FILE" 2>/dev/null)" = debian ]; then
    debian_wasm_cargo "$@"
  else
    cargo "$@"
  fi
}

# Debian ships no standard library for the target, only its sources and a libc: the library is built
# with the filter, which takes an unstable flag and hence RUSTC_BOOTSTRAP.
debian_wasm_cargo() {
  local command=$1
  shift
  RUSTC_BOOTSTRAP=1 RUSTC=/usr/bin/rustc \
    RUSTFLAGS="-L native=/usr/lib/wasm32-wasi -C link-self-contained=no" \
    /usr/bin/cargo "$command" -Zbuild-std=std,panic_abort "$@"
}

# Runs cargo with its progress, without the lines that say that there was nothing to do.
quietly() {
  local colour=never
  [ -t 2 ] && colour=always
  CARGO_TERM_COLOR=$colour "$@" 2>&1 | { grep -vE '(Finished|Blocking waiting)' || true; } >&2
}

# --- processes ------------------------------------------------------------------------------------
# Three: keygate, envoy and upstream. Each runs in $STATE and has $STATE/NAME.pid.

program_of() {
  case $1 in
    keygate) printf '%s\n' "$KEYGATE" ;;
    upstream) printf '%s\n' "$UPSTREAM" ;;
    envoy) find_envoy ;;
  esac
}

# Whether the process that NAME's pid file names is ours: its program has NAME's name and its working
# directory is ours. A recycled pid has neither, a zombie has no program. The control plane lets nobody but root
# look into it (no core dumps either): then its name has to do.
is_running() {
  local pid exe
  pid=$(cat "$STATE/$1.pid" 2>/dev/null) || return 1
  [[ $pid =~ ^[0-9]+$ ]] || return 1
  if [ "$1" = keygate ] && [ "$(id -u)" != 0 ]; then
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = keygate ]
    return
  fi
  exe=$(readlink "/proc/$pid/exe" 2>/dev/null) || return 1
  exe=${exe% (deleted)}
  case $1 in
    upstream) [ "${exe##*/}" = demo-upstream ] ;;
    *) [ "${exe##*/}" = "$1" ] ;;
  esac || return 1
  [ "$(readlink "/proc/$pid/cwd" 2>/dev/null)" = "$STATE" ]
}

pid_of() { cat "$STATE/$1.pid"; }

# Whether what runs is older than what was built since.
is_outdated() {
  case $1 in
    envoy)
      case $(cat "$STATE/filter" 2>/dev/null) in
        module) [ "$MODULE" -nt "$STATE/envoy.pid" ] ;;
        *) [ "$FILTER" -nt "$STATE/envoy.pid" ] ;;
      esac
      ;;
    *) [ "$(program_of "$1")" -nt "$STATE/$1.pid" ] ;;
  esac
}

# start NAME PROGRAM ARGS...: in a session of its own, so that neither the end of the terminal nor
# Ctrl-C in it reaches the process; output to its log.
start() {
  local name=$1
  shift
  # The shell that writes the pid becomes the program, so the pid is right from the first moment.
  (
    cd "$STATE"
    # shellcheck disable=SC2016
    setsid bash -c 'echo $$ >"$1.pid"; shift; exec "$@"' start "$name" "$@" \
      </dev/null >>"$LOGS/$name.log" 2>&1 &
  )
  wait_until 5 is_running "$name" || fail_with_log "$name" "$name did not start"
}

stop() {
  local name=$1 pid
  if is_running "$name"; then
    pid=$(pid_of "$name")
    kill -TERM "$pid" 2>/dev/null || true
    if ! wait_until 15 is_not_running "$name"; then
      note "$name does not stop when asked to; killing it (pid $pid)"
      kill -KILL "$pid" 2>/dev/null || true
      wait_until 5 is_not_running "$name" || die "$name (pid $pid) cannot be killed"
    fi
    say "stopped $name"
  fi
  rm -f "$STATE/$name.pid"
}

is_not_running() { ! is_running "$1"; }

# Has Envoy report what it spent of limits and give the rest back: without that, its last 100 ms may be admitted once more.
drain_envoy() {
  local port node status
  read -r port node 2>/dev/null <"$STATE/envoy.node" || return 0
  status=$(curl -s -m 5 -o /dev/null -w '%{http_code}' -H @- "http://localhost:$port/sync/v1/drain" \
    -d "{\"format\": 1, \"proxy\": \"$node\"}" <<<"authorization: Bearer $(<"$STATE/data/fleet.token")") || true
  case $status in
    200 | 404) ;; # 404: no limits are enforced
    *) note "Envoy was not drained ($status); what it spent in the last 100 ms is not known to limits" ;;
  esac
}

# Clients first lose the proxy, then the proxy its control plane and upstream. Before it ends, the proxy reports what it
# spent of limits.
stop_all() {
  local name
  if is_running envoy && is_running keygate; then drain_envoy; fi
  for name in envoy keygate upstream; do stop "$name"; done
}

# --- waiting --------------------------------------------------------------------------------------

# wait_until SECONDS COMMAND...: until the command succeeds; fails when it does not in time.
wait_until() {
  local deadline=$((${EPOCHREALTIME/[.,]/} + $1 * 1000000))
  shift
  until "$@"; do
    ((${EPOCHREALTIME/[.,]/} < deadline)) || return 1
    sleep 0.05
  done
}

answers_200() { [ "$(curl -s -o /dev/null -m 2 -w '%{http_code}' "$1" || true)" = 200 ]; }

ready_or_dead() { answers_200 "$2" || ! is_running "$1"; }

# wait_ready NAME SECONDS URL: until the URL answers 200, as long as the process lives.
wait_ready() {
  wait_until "$2" ready_or_dead "$1" "$3" || fail_with_log "$1" "$1 runs but is not ready after $2 s ($3)"
  is_running "$1" || fail_with_log "$1" "$1 has stopped"
}

fail_with_log() {
  note "--- the end of $LOGS/$1.log"
  tail -n 25 "$LOGS/$1.log" >&2 2>/dev/null || true
  note "---"
  die "$2; the whole log is $LOGS/$1.log"
}

# --- ports ----------------------------------------------------------------------------------------

# Prints who listens on a port, nothing when nobody does.
listener_of() {
  local hex inode link pid
  printf -v hex '%04X' "$1"
  # State 0A is LISTEN; the tenth column is the socket's inode.
  inode=$(awk -v port=":$hex\$" '$4 == "0A" && $2 ~ port { print $10; exit }' \
    /proc/net/tcp /proc/net/tcp6 2>/dev/null || true)
  [ -n "$inode" ] || return 0
  for link in /proc/[0-9]*/fd/*; do
    if [ "$(readlink "$link" 2>/dev/null)" = "socket:[$inode]" ]; then
      pid=${link#/proc/}
      pid=${pid%%/*}
      printf 'pid %s (%s)\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)"
      return 0
    fi
  done
  printf 'a process of another user\n'
}

# need_port PORT FLAG WHAT
need_port() {
  local owner
  owner=$(listener_of "$1")
  [ -z "$owner" ] || die "port $1, for $3, is taken by $owner; stop that, or choose another with $2"
}

# --- calls ----------------------------------------------------------------------------------------

# call KEY ARGS...: curl with the key as bearer. Through a file descriptor: a command line is visible
# to every user of the machine.
call() {
  local key=$1
  shift
  curl --silent --show-error --max-time 20 \
    --config <(printf 'header = "Authorization: Bearer %s"\n' "$key") "$@"
}
