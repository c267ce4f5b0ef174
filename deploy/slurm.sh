#!/bin/bash
# One run on several nodes of a Slurm cluster: Ray starts on each, the command runs on the first, and then all of it ends.
#
#   sbatch deploy/slurm.sh
#
# The same command again goes on from the newest checkpoint: after the time limit, and by itself after a lost node or a preemption
# (--requeue). What must be edited is marked EDIT. `ray symmetric-run` is as in Ray 2.60:
# https://docs.ray.io/en/latest/cluster/vms/user-guides/community/slurm.html
#SBATCH --job-name=rayalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# No other job on the nodes: Ray's ports are free then, and the end of this cluster ends nobody else's.
#SBATCH --exclusive

set -euo pipefail

# EDIT: an environment with rayalign that all nodes see.
# shellcheck source=/dev/null
source .venv/bin/activate

# EDIT: folders that all nodes see, or URLs.
output_dir=/shared/runs/first
run=(
    rayalign dpo --model /shared/models/llava --dataset /shared/data/prefs.jsonl --output_dir "$output_dir"
    --num_workers 8 --gpus_per_worker 1 --cpus_per_worker 6
)

# This script runs on the first node, which becomes the head. EDIT where its first address is not the one that the others reach.
read -r address _ < <(hostname --all-ip-addresses)
address=$address:6379

# Only processes of this job may use its cluster.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
# Nodes may take longer to start than the 30 s that Ray gives them.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# Tells below that the command came to its end, wherever its folder is.
done=$PWD/$SLURM_JOB_NAME-$SLURM_JOB_ID.done
rm -f "$done"

# srun takes --cpus-per-task from no one else since Slurm 22.05. (The inner bash reads the words that are given to it.)
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --disable-usage-stats \
    -- env RAY_ADDRESS="$address" bash -c 'done=$1; shift; "$@" && touch "$done"' run "$done" "${run[@]}"

# Where Ray itself does not start, `ray symmetric-run` says so and ends with 0.
if [[ ! -e $done ]]; then
    echo "The run has not finished: $output_dir" >&2
    exit 1
fi
rm -f "$done"
