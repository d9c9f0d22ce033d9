#!/bin/sh
# Starts redis-server or a sentinel with the users of users.acl and the passwords of the environment.
#
#   start.sh CONF [ARGUMENT…]    redis-server with CONF beside this file: redis.conf, redis-cache.conf
#   start.sh sentinel.conf       a sentinel
#
# Of users.acl, each user that has no password in the environment is left out:
#   REDIS_PASSWORD_TOLLGATE, _MONITOR, _REPLICA, _SENTINEL, _OPERATOR
# REPLICA_OF="HOST PORT"         begins as a replica (a failover may have changed that since: then it stays so)
# SENTINEL_MASTER="HOST PORT"    the first master, SENTINEL_QUORUM how many must agree (2)
# DATA (/data) is kept, RUN (/run/redis) is not: memory is enough for it.
set -eu
umask 077

here=$(cd "$(dirname "$0")" && pwd)
data=${DATA:-/data}
run=${RUN:-/run/redis}
conf=$1
shift

stop() { echo "start.sh: $*" >&2; exit 78; }

# Passwords go into files and URLs as they are.
password() {
    eval "value=\${REDIS_PASSWORD_$1:-}"
    case $value in
        *[!A-Za-z0-9._~-]*) stop "REDIS_PASSWORD_$1: only letters, digits and . _ ~ - are allowed" ;;
    esac
    [ -z "$value" ] || [ ${#value} -ge 16 ] || stop "REDIS_PASSWORD_$1: at least 16 characters are needed"
    printf %s "$value"
}
sha256() { printf %s "$1" | sha256sum | cut -d' ' -f1; }

cp "$here/users.acl" "$run/users.acl"
chmod 600 "$run/users.acl"
for user in TOLLGATE MONITOR REPLICA SENTINEL OPERATOR; do
    value=$(password $user)
    if [ -n "$value" ]; then edit="s/#${user}_SHA256 /#$(sha256 "$value") /"; else edit="/#${user}_SHA256 /d"; fi
    sed "$edit" "$run/users.acl" >"$run/users.acl.new"
    mv "$run/users.acl.new" "$run/users.acl"
done

if [ "$conf" = sentinel.conf ]; then
    [ -n "$(password SENTINEL)" ] || stop "a sentinel needs REDIS_PASSWORD_SENTINEL"
    # Kept: it is where a sentinel remembers failovers.
    if [ ! -f "$data/sentinel.conf" ]; then
        {
            echo "dir $data"
            # The master comes before what is said of it.
            echo "sentinel monitor mymaster ${SENTINEL_MASTER:?} ${SENTINEL_QUORUM:-2}"
            cat "$here/sentinel.conf"
            echo "sentinel auth-user mymaster sentinel"
            echo "sentinel auth-pass mymaster $(password SENTINEL)"
            # Sentinels ask each other with this one; gateways are told who the master is, and no more.
            echo "requirepass $(password SENTINEL)"
            echo "user tollgate on #$(sha256 "$(password TOLLGATE)") &+switch-master -@all +ping +subscribe" \
                "+unsubscribe +sentinel|get-master-addr-by-name +sentinel|master"
        } >"$data/sentinel.conf"
    fi
    exec redis-server "$data/sentinel.conf" --sentinel "$@"
fi

# Written anew each time, but for what a failover has written into it: whose replica it is.
replica_of=${REPLICA_OF:+replicaof $REPLICA_OF}
[ ! -f "$data/redis.conf" ] || replica_of=$(grep '^replicaof ' "$data/redis.conf" || true)
{
    echo "include $here/$conf"
    echo "dir $data"
    echo "aclfile $run/users.acl"
    echo "$replica_of"
    if [ -n "$(password REPLICA)" ]; then
        echo "masteruser replica"
        echo "masterauth $(password REPLICA)"
    fi
} >"$data/redis.conf"
exec redis-server "$data/redis.conf" "$@"
