#!/bin/sh
# Writes .env from .env.example, for its owner alone, with a random value for every empty one, and
# the memory of worker-gpu for as many GPUs as the driver lists.
set -eu
umask 077
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo ".env is there already; expected none" >&2
    exit 1
fi
trap 'rm -f .env.new' EXIT
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || :)
while IFS= read -r line; do
    case "$line" in
        *=)
            value=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
            if [ ${#value} -ne 48 ]; then
                echo "no random value came of od and /dev/urandom; .env is not written" >&2
                exit 1
            fi
            echo "$line$value"
            ;;
        INFERQ_GPU_WORKER_MEMORY=*g)
            each=${line#*=}
            echo "${line%%=*}=$((${each%g} * (${gpus:-0} > 1 ? ${gpus:-0} : 1)))g"
            ;;
        *) echo "$line" ;;
    esac
done < .env.example > .env.new
mv .env.new .env
