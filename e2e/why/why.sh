#!/usr/bin/env bash
# why: things go wrong one after the other, and `meshctl why` names each cause and what to do.
source "$(dirname "$0")/../lib.sh"

services shop-1
control
shard
edge shop-1 web http "127.0.0.1:${at[shop-1.http]}"
edges_ready shop-1
allow group/admin 'edge/*' '*'
allow group/admin service/web

step 'nothing is wrong'
told none 0 'is there: shard-1 holds its tunnel' shop-1
told none 0 'answers it' shop-1/web
ok "$sentence"

step 'the rule is missing, the service is, the port is closed'
ctl token create --user alice 2>> "$dir/log/meshctl.log" |
  CAUSEWAY_HOME=$dir/alice meshctl login > /dev/null 2>> "$dir/log/meshctl.log"
as_alice() { CAUSEWAY_HOME=$dir/alice meshctl "$@"; }
words=$(refused as_alice why shop-1/web)
same "$(status)" 3
has "$words" 'meshctl policy allow --from user/alice'
told way 4 'service-unknown' shop-1/mail
port closed
told way 3 'edge-denied' "shop-1:${at[closed]}"
ok "$(head -n 1 <<< "$words")"

step 'nobody enrolled by that name'
told edge-unknown 1 'meshctl token create --edge --name shop-2' shop-2
ok "$sentence"

step 'enrolled, and never started'
edge_config shop-2
ctl token create --edge --name shop-2 2>> "$dir/log/meshctl.log" |
  mesh-edge join --config "$dir/shop-2.toml" 2>> "$dir/log/shop-2.log"
told never-connected 4 "$host:" shop-2
ok "$sentence"

step 'stopped in good order'
start_edge shop-2
edges_ready shop-2
stop shop-2
told stopped 4 'systemctl start mesh-edge' shop-2
ok "$sentence"

step 'killed: nothing comes any more'
start_edge shop-2
edges_ready shop-2
crash shop-2
told silent 4 'gave it up' shop-2
ok "$sentence"

step 'two machines with one identity'
start_edge shop-2
edges_ready shop-2
cp -r "$dir/shop-2" "$dir/twin"
edge_config twin
sed -i "s|^data_dir = .*|data_dir = '$dir/twin'|" "$dir/twin.toml"
start_edge twin
duplicated() { (($(metric "${at[shard.admin]}" mesh_shard_duplicate_identities_total) > 0)); }
wait_for 90 duplicated
told duplicate-identity 0 'under a name of its own' shop-2
stop twin
stop shop-2
ok "$sentence"

step 'revoked'
ctl edge revoke shop-2 --yes > /dev/null
told revoked 3 '--replace' shop-2
ok "$sentence"

step 'no shard is alive'
crash shard-1
told no-shard 4 'mesh-cloud' shop-1
ok "$sentence"

step 'control is away'
start_shard
edges_ready shop-1
crash control
told none 0 'is there' shop-1
crash shard-1
told control-away 4 "127.0.0.1:${at[control.api]}" shop-1
ok "$sentence"
