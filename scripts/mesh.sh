# Sourced by demo/run, scripts/bench and the stories in e2e/: starts real processes of a mesh in a folder of its own,
# waits for conditions, and ends what it started, whatever happens.
# shellcheck shell=bash

set -euo pipefail
export LC_ALL=C.UTF-8

: "${CARGO_TARGET_DIR:=${XDG_CACHE_HOME:-$HOME/.cache}/causeway/target}"
# Where the programs are; make builds them.
bin=${CAUSEWAY_BIN:-$CARGO_TARGET_DIR/debug}
PATH=$bin:$PATH:/usr/sbin:/sbin
for pg in /usr/lib/postgresql/*/bin; do PATH=$PATH:$pg; done
domain=mesh.test
# Where everything listens; an IPv6 address in brackets.
: "${host:=127.0.0.1}"

dir=$(mktemp -d "${TMPDIR:-/tmp}/causeway.XXXXXX")
chmod 755 "$dir" # other users' services, such as PostgreSQL's, keep their files inside
mkdir "$dir/log"
export CAUSEWAY_HOME=$dir/home

# --- time ---------------------------------------------------------------------------------------------------------

# Milliseconds of a clock; only differences mean something.
now() { echo $((${EPOCHREALTIME/./} / 1000)); }

# since START: how long ago that was, for people.
since() {
  local ms=$(($(now) - $1))
  if ((ms < 1000)); then echo "$ms ms"; else printf '%d.%02d s\n' $((ms / 1000)) $((ms % 1000 / 10)); fi
}

# wait_for SECONDS COMMAND...: until the command succeeds; CAUSEWAY_PATIENCE times as long, where much else goes on.
wait_for() {
  local seconds=$1 until
  shift
  until=$(($(now) + seconds * 1000 * ${CAUSEWAY_PATIENCE:-1}))
  until "$@" > /dev/null 2>&1; do
    if (($(now) > until)); then
      echo "waited $seconds s in vain for: $*" >&2
      return 1
    fi
    sleep 0.05
  done
}

# --- processes ----------------------------------------------------------------------------------------------------

declare -A pid=()

# start NAME COMMAND...: in the background; what it says goes to log/NAME.out and log/NAME.log.
start() {
  local name=$1
  shift
  "$@" >> "$dir/log/$name.out" 2>> "$dir/log/$name.log" < /dev/null &
  pid[$name]=$!
}

running() { kill -0 "${pid[$1]}" 2> /dev/null; }

# stop NAME: asks it to end, and waits until it has. crash NAME: ends it without asking.
stop() { end "$1" TERM; }
crash() { end "$1" KILL; }

end() {
  local it=${pid[$1]:-}
  [[ -n $it ]] || return 0
  kill -"$2" "$it" 2> /dev/null || true
  wait "$it" 2> /dev/null || true
  unset "pid[$1]"
}

finish() {
  local status=$? name it
  trap - EXIT ERR
  set +e
  [[ $status == 0 ]] || complain "$status"
  declare -F clean_up > /dev/null && clean_up
  for name in "${!pid[@]}"; do kill -TERM "${pid[$name]}" 2> /dev/null; done
  for name in "${!pid[@]}"; do
    it=${pid[$name]}
    # A process that does not end within its drain time is not waited for any longer.
    wait_for 5 gone "$it" 2> /dev/null || kill -KILL "$it" 2> /dev/null
    wait "$it" 2> /dev/null
  done
  if [[ -n ${CAUSEWAY_KEEP:-} ]]; then echo "files are kept in $dir" >&2; else rm -rf "$dir"; fi
  exit "$status"
}
gone() { [[ ! -d /proc/$1 || $(cut -d' ' -f3 < "/proc/$1/stat") == Z ]]; }
trap finish EXIT
trap 'exit 130' INT TERM

# What was going on when it went wrong; stories say it in their own way.
complain() {
  local log
  for log in "$dir"/log/*.log; do
    [[ -s $log ]] || continue
    printf -- '--- %s\n' "${log##*/}" >&2
    tail -n 12 "$log" >&2
  done
}

# --- ports --------------------------------------------------------------------------------------------------------

free_ports=()
declare -A at=()

# port NAME...: a free port for each, in at[NAME].
port() {
  local name
  for name in "$@"; do
    if [[ ${#free_ports[@]} == 0 ]]; then mapfile -t free_ports < <(mesh-loadtest ports 60); fi
    at[$name]=${free_ports[0]}
    free_ports=("${free_ports[@]:1}")
  done
}

# Whether somebody listens on a TCP port of the loopback.
listening() { (exec 3<> "/dev/tcp/$(tr -d "[]" <<< "$host")/$1") 2> /dev/null; }

# --- the mesh -----------------------------------------------------------------------------------------------------

ctl() { meshctl "$@"; }
get() { mesh-loadtest get "$@"; }
# ready PORT: whether the process with that admin port says that it is ready.
ready() { get "http://$host:$1/readyz" > /dev/null; }

# metric PORT NAME[{LABELS}]: its value at the process with that admin port; 0 if it is not there.
metric() { get "http://$host:$1/metrics" | awk -v name="$2" '$1 == name { value = $2 } END { print value + 0 }'; }

# Resident memory of a process, in KiB.
rss() { awk '$1 == "VmRSS:" { print $2 }' "/proc/${pid[$1]}/status"; }

# control [LINE...]: starts mesh-control with SQLite, with more lines of configuration, and logs in as its administrator.
control() {
  port control.api control.admin
  {
    echo "listen = '$host:${at[control.api]}'"
    echo "admin = '$host:${at[control.admin]}'"
    echo "public = ['$host:${at[control.api]}']"
    echo "data_dir = '$dir/control'"
    echo "trust_domain = '$domain'"
    printf '%s\n' "$@"
  } > "$dir/control.toml"
  start control mesh-control --config "$dir/control.toml"
  wait_for 20 ready "${at[control.admin]}"
  ctl login --file "$dir/control/admin.join" > /dev/null
}

# Doors of the shard that lead to one target each: door NAME TARGET, before the shard is started. Its port is at[NAME].
tcp_doors=()
door() {
  port "$1"
  tcp_doors+=("[[doors.tcp]]" "name = '$1'" "listen = '$host:${at[$1]}'" "target = '$2'")
}

# udp_door NAME TARGET [LINE...]: the same for UDP, with more lines of configuration. One of the name of a door that is
# there has the same port number.
udp_door() {
  local name=$1 target=$2
  shift 2
  [[ -n ${at[$name]:-} ]] || port "$name"
  tcp_doors+=("[[doors.udp]]" "name = '$name'" "listen = '$host:${at[$name]}'" "target = '$target'" "$@")
}

# shard [LINE...]: enrols shard-1 and starts it; the first start chooses the ports: at[shard.mesh], at[shard.http] ...
shard() { shard_as shard-1 shard "$@"; }

# Set to open the SSH door of every shard that is started from then on, at[shard.ssh] or at[NAME.ssh].
ssh_doors=

# another_shard NAME [LINE...]: the same for one more, without TCP doors; its ports are at[NAME.mesh] and so on.
another_shard() {
  local tcp_doors=() name=$1
  shift
  shard_as "$name" "$name" "$@"
}

shard_as() {
  local name=$1 at_name=$2 part
  shift 2
  for part in mesh proxy http https ssh admin; do port "$at_name.$part"; done
  {
    echo "data_dir = '$dir/$name'"
    echo "name = '$name'"
    echo "listen = '$host:${at[$at_name.mesh]}'"
    echo "admin = '$host:${at[$at_name.admin]}'"
    echo "domain = '$domain'"
    echo "access = { file = '$dir/log/$name.access' }"
    echo "drain_secs = 2"
    printf '%s\n' "$@"
    echo "[doors]"
    echo "proxy = '$host:${at[$at_name.proxy]}'"
    echo "http = '$host:${at[$at_name.http]}'"
    echo "https = '$host:${at[$at_name.https]}'"
    if [[ -n $ssh_doors ]]; then echo "ssh = '$host:${at[$at_name.ssh]}'"; fi
    printf '%s\n' "${tcp_doors[@]}"
  } > "$dir/$name.toml"
  ctl token create --shard --name "$name" 2>> "$dir/log/meshctl.log" |
    mesh-cloud join --config "$dir/$name.toml" 2>> "$dir/log/$name.log"
  start_shard "$name"
  wait_for 20 ready "${at[$at_name.admin]}"
}
start_shard() { start "${1:-shard-1}" mesh-cloud --config "$dir/${1:-shard-1}.toml"; }

# edge NAME [SERVICE KIND ADDRESS]... [-- LINE...]: enrols it and starts it. Its admin port is at[NAME].
edge() {
  local name=$1
  shift
  edge_config "$name" "$@"
  ctl token create --edge --name "$name" 2>> "$dir/log/meshctl.log" |
    mesh-edge join --config "$dir/$name.toml" 2>> "$dir/log/$name.log"
  start_edge "$name"
}
start_edge() { start "$1" mesh-edge --config "$dir/$1.toml"; }

edge_config() {
  local name=$1 services=()
  shift
  port "$name"
  while [[ $# -gt 0 && $1 != -- ]]; do
    services+=("[[services]]" "name = '$1'" "kind = '$2'" "address = '$3'")
    shift 3
  done
  [[ $# == 0 ]] || shift
  {
    echo "data_dir = '$dir/$name'"
    echo "admin = '$host:${at[$name]}'"
    echo "access = 'off'"
    echo "drain = 1"
    printf '%s\n' "$@"
    printf '%s\n' "${services[@]}"
  } > "$dir/$name.toml"
}

# An edge is ready when a shard answered a probe through its tunnel.
edge_ready() { ready "${at[$1]}"; }
edges_ready() {
  local name
  for name in "$@"; do wait_for 20 edge_ready "$name"; done
}

# allow WHO WHAT [PORTS]: a policy rule; returns when the shard follows it.
allow() {
  local revision
  revision=$(metric "${at[shard.admin]}" mesh_shard_control_revision)
  ctl policy allow --from "$1" --to "$2" ${3:+--ports "$3"} > /dev/null
  wait_for 5 follows "$revision"
}
follows() { (($(metric "${at[shard.admin]}" mesh_shard_control_revision) > $1)); }
