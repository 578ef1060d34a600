#!/bin/sh
# Usage: spot.sh ray start --block ...
# Drains the node once AWS says, two minutes before, that it takes the spot instance away: trials
# save what they did and go on elsewhere. Until then it is the given command.
metadata=${METADATA:-http://169.254.169.254/latest}
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=110 "$@" &
while kill -0 $! 2> /dev/null; do
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token")
    if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
        "$metadata/meta-data/spot/instance-action"; then
        kill $!  # by which `ray start --block` drains its node
        break
    fi
    sleep 5
done
wait $!
