#!/bin/sh
# Makes one cluster of servers, each given as HOST:PORT: the first half masters, the other half their replicas. Does
# nothing to servers that are a cluster already.
set -eu
export REDISCLI_AUTH="${REDIS_PASSWORD_OPERATOR:?}"

ask() { redis-cli --user operator --no-auth-warning -h "${1%:*}" -p "${1##*:}" cluster info; }

if ask "$1" | grep -q cluster_state:ok; then
    echo "join.sh: they are a cluster"
    exit 0
fi
redis-cli --user operator --no-auth-warning --cluster create "$@" --cluster-replicas 1 --cluster-yes
