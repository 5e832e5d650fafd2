# Sourced by stories about bad networks: a cloud, where control and the shard are, the Internet, a router with a firewall
# and a NAT, and a site behind it with an edge. Sources e2e/lib.sh.
#
#   cloud ($host, this machine) --- Internet --- router --- site
#
# The Internet is a wire, or mesh-loadtest's link emulator on TUN devices; the router and the site are network namespaces.
# What the router does, and what the Internet is like, can be changed at any time.
# shellcheck shell=bash
net=10.$((RANDOM % 100 + 20)).$((RANDOM % 200 + 20))
inside=10.$((RANDOM % 100 + 130)).$((RANDOM % 200 + 20))
# Where control and the shard listen.
host=$net.1
# shellcheck source=e2e/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

router=causeway-router-$$ site=causeway-site-$$
# Devices: cloud and router on the Internet, router and site inside.
cloud_dev=cc$$ wan_dev=cr$$ lan_dev=cl$$ site_dev=cs$$
router_address=$net.2 site_address=$inside.2

# Whether all of it is wanted, or what every change can wait for.
whole() { [[ ${CAUSEWAY_LAB:-} == whole ]]; }

# needs_lab: ends the story where there can be no namespaces, or no TUN devices if the Internet is emulated.
needs_lab() {
  step 'a network behind a router'
  [[ $(id -u) == 0 && -c /dev/net/tun ]] || {
    not_here 'it takes root and /dev/net/tun to make one'
    exit 0
  }
}

clean_up() {
  ip netns del "$site" 2> /dev/null
  ip netns del "$router" 2> /dev/null
}

# lab wire | lab link [NAME=VALUE...]: makes it, with a wire for the Internet or an emulated link.
lab() {
  needs_lab
  ip netns add "$router"
  ip netns add "$site"
  if [[ $1 == wire ]]; then
    ip link add "$cloud_dev" type veth peer name "$wan_dev"
  else
    start link mesh-loadtest link run --a "$cloud_dev" --b "$wan_dev" --socket "$dir/link"
    wait_for 5 grep -q ready "$dir/log/link.out"
    internet both "${@:2}"
  fi
  ip link set "$wan_dev" netns "$router"
  ip addr add "$net.1/24" dev "$cloud_dev"
  ip link set "$cloud_dev" up
  ip -n "$router" addr add "$router_address/24" dev "$wan_dev"
  ip -n "$router" link set "$wan_dev" up
  ip -n "$router" link set lo up
  ip -n "$router" link add "$lan_dev" type veth peer name "$site_dev" netns "$site"
  ip -n "$router" addr add "$inside.1/24" dev "$lan_dev"
  ip -n "$router" link set "$lan_dev" up
  ip -n "$site" addr add "$site_address/24" dev "$site_dev"
  ip -n "$site" link set "$site_dev" up
  ip -n "$site" link set lo up
  ip -n "$site" route add default via "$inside.1"
  in_router sysctl -qw net.ipv4.ip_forward=1
  # Nobody in the cloud has a way to addresses behind a NAT, so that there is none without one.
  nat port
  ok "Internet: $*"
}

in_site() { ip netns exec "$site" "$@"; }
in_router() { ip netns exec "$router" "$@"; }

# internet both|down|up NAME=VALUE...: what the emulated Internet is like, as `mesh-loadtest link tell` has it; down is
# towards the site. internet_figures both|down|up: what it counted.
internet() {
  local side
  case $1 in down) side=a ;; up) side=b ;; *) side=both ;; esac
  mesh-loadtest link tell --socket "$dir/link" "$side" "${@:2}" > /dev/null
}
internet_figures() {
  local side
  case $1 in down) side=side=a ;; up) side=side=b ;; *) side=side ;; esac
  mesh-loadtest link tell --socket "$dir/link" stats | grep "^$side"
}
internet_forget() { mesh-loadtest link tell --socket "$dir/link" forget > /dev/null; }

# rules TABLE: replaces a table of the router's firewall by what comes from standard input.
rules() {
  {
    echo "table ip lab_$1"
    echo "delete table ip lab_$1"
    echo "table ip lab_$1 {"
    cat
    echo "}"
  } | in_router nft -f -
}

# udp pass|drop|reject|RATE: what the router does with UDP; a rate (64 kbytes/second) is policed.
udp() {
  local what
  case $1 in pass) what=accept ;; drop | reject) what=$1 ;; *) what="limit rate over $1 drop" ;; esac
  rules udp <<< "chain forward { type filter hook forward priority 0; policy accept; meta l4proto udp counter $what; }"
}

# nat KIND: by which NAT (RFC 4787) the site is behind the router. What was known of connections is forgotten.
#   full       full cone: whoever knows its address gets in
#   address    address-restricted cone: whoever it has sent something to, from any port
#   port       port-restricted cone: who answers, from where it was sent to; its port outside is that inside
#   symmetric  every destination sees another port, by chance
nat() {
  local masquerade=masquerade inwards='' seen=''
  case $1 in
    full) inwards="iifname $wan_dev meta l4proto udp dnat to $site_address" ;;
    address)
      seen="oifname $wan_dev meta l4proto udp update @contacted { ip daddr }"
      inwards="iifname $wan_dev meta l4proto udp ip saddr @contacted dnat to $site_address"
      ;;
    port) ;;
    symmetric) masquerade='masquerade random,fully-random' ;;
    *) fail "there is no NAT of kind $1" ;;
  esac
  rules nat << RULES
    set contacted { type ipv4_addr; flags dynamic, timeout; timeout 60s; size 1024; }
    chain contacted { type filter hook postrouting priority 0; $seen; }
    chain outwards { type nat hook postrouting priority 100; oifname $wan_dev $masquerade; }
    chain inwards { type nat hook prerouting priority -100; $inwards; }
RULES
  nat_forgets
}

# The NAT forgets every mapping, as one that was started again.
nat_forgets() { in_router conntrack -F > /dev/null 2>&1; }

# site_moves N: the site's address is another one now, and the old one is gone, as with a new lease.
site_moves() {
  local old=$site_address
  site_address=$inside.$1
  ip -n "$site" addr add "$site_address/24" dev "$site_dev"
  ip -n "$site" addr del "$old/24" dev "$site_dev"
  ip -n "$site" addr replace "$site_address/24" dev "$site_dev"
  ip -n "$site" route replace default via "$inside.1"
}

# router_moves N: the router's address on the Internet is another one now.
router_moves() {
  local old=$router_address
  router_address=$net.$1
  ip -n "$router" addr add "$router_address/24" dev "$wan_dev"
  ip -n "$router" addr del "$old/24" dev "$wan_dev"
  ip -n "$router" addr replace "$router_address/24" dev "$wan_dev"
  nat_forgets
}

# --- the edge at the site -----------------------------------------------------------------------------------------

# site_edge NAME [SERVICE KIND ADDRESS]... [-- LINE...]: enrols an edge there; start_site_edge starts it.
site_edge() {
  edge_config "$@"
  sed -i "s/^admin = .*/admin = '127.0.0.1:${at[$1]}'/" "$dir/$1.toml"
  ctl token create --edge --name "$1" 2>> "$dir/log/meshctl.log" |
    in_site "$(command -v mesh-edge)" join --config "$dir/$1.toml" 2>> "$dir/log/$1.log"
}
start_site_edge() { start "$1" ip netns exec "$site" "$(command -v mesh-edge)" --config "$dir/$1.toml"; }

# What the edge says of itself. over CARRIER: whether its tunnel is over that one.
site_get() { in_site "$(command -v mesh-loadtest)" get "http://127.0.0.1:${at[$1]}/$2"; }
site_edge_ready() { site_get "$1" readyz > /dev/null; }
edge_metric() { site_get "${2:-shop-1}" metrics | awk -v name="$1" '$1 == name { value = $2 } END { print value + 0 }'; }
over() { [[ $(edge_metric "mesh_edge_carrier{carrier=\"$1\"}") == 1 ]]; }
shard_over() { metric "${at[shard.admin]}" "mesh_shard_carrier_tunnels{carrier=\"$1\"}"; }

# site_tricks: the tricks of mesh-loadtest at the site, at[tricks].
site_tricks() {
  port tricks
  start tricks ip netns exec "$site" "$(command -v mesh-loadtest)" serve --name site --tricks "127.0.0.1:${at[tricks]}"
  wait_for 10 grep -q ready "$dir/log/tricks.out"
}
# echo_site [LINE...]: control and a shard in the cloud, and the edge shop-1, not started yet, which has the tricks for a
# service, to which the door `echo` leads. The lines are for its configuration.
echo_site() {
  control
  door echo shop-1/echo
  shard
  site_tricks
  site_edge shop-1 echo tcp "127.0.0.1:${at[tricks]}" -- "$@"
  allow door/echo service/echo
  allow group/admin 'edge/*' '*'
}
# One small stream to the site and back, through the door `echo`.
echoes() { timeout 0.5 mesh-loadtest echo --connect "$host:${at[echo]}" --say echo --bytes 100 > /dev/null; }

# site_sshd: OpenSSH's server at the site, at[sshd], with keys for it; ssh_config is for this side, $dir/ssh_config.
site_sshd() {
  port sshd
  ssh_files "${at[sshd]}"
  start sshd ip netns exec "$site" "$(command -v sshd)" -D -e -f "$dir/sshd_config"
  wait_for 10 in_site nc -z 127.0.0.1 "${at[sshd]}"
}

# took_less BEGAN LIMIT_MS WHAT
took_less() { below "$(($(now) - $1))" "$2" "$3 in ms"; }

# growing FILE: writes down the longest time in ms that a file did not grow, into FILE.pause, until there is FILE.done.
growing() {
  local size=-1 next since longest=0
  since=$(now)
  while [[ ! -e $1.done ]]; do
    next=$(stat -c %s "$1" 2> /dev/null || echo 0)
    if [[ $next != "$size" ]]; then
      # It counts from the first byte on.
      if ((size > 0 && $(now) - since > longest)); then longest=$(($(now) - since)); fi
      size=$next since=$(now)
    fi
    sleep 0.02
  done
  echo "$longest" > "$1.pause"
}
