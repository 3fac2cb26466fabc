#!/usr/bin/env bash
# Trains on a slice of a Cloud TPU pod, one process a host.
#
#   launch/tpu_pod.sh create     makes the slice
#   launch/tpu_pod.sh install    puts the last commit on each host, and installs it there
#   launch/tpu_pod.sh train      starts the run, or goes on with it; keep the terminal open (tmux)
#   launch/tpu_pod.sh stop       lets all hosts save a checkpoint and end
#   launch/tpu_pod.sh delete     gives the slice back
#
# It assumes an NFS server (such as Filestore) in the slice's network. Every host mounts its export as /shared, which
# has the prepared data and gets the run. Without such a server, --data.dir and `run` can be addresses such as
# gs://bucket/runs/gpt2; then install './gpt_jax[tpu,gcs]'. JAX finds the hosts through the slice's metadata.
# After a preemption: delete, create, install, train. If a host had no time to save, the run goes back to the last
# checkpoint, so --train.checkpoint-every decides how much is lost.
set -euo pipefail
cd "$(dirname "$0")/.."

place=(--project=my-project --zone=us-west4-a)                                    # EDIT
slice=(--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot)      # EDIT: four hosts of four chips
nfs=10.0.0.2:/shared                                                              # EDIT
name=gpt2
run=/shared/runs/gpt2

on_each_host() { gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"; }

case "${1:-}" in
    create) gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${slice[@]}" ;;
    delete) gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet ;;
    install)
        code=$(mktemp -d)
        git archive --format=tar.gz --output="$code/gpt_jax.tar.gz" HEAD
        gcloud compute tpus tpu-vm scp "$code/gpt_jax.tar.gz" "$name:" "${place[@]}" --worker=all
        # uv brings its own Python, since the hosts' 3.10 is too old.
        on_each_host "
            set -e
            sudo apt-get install -y nfs-common
            sudo mkdir -p /shared
            mountpoint -q /shared || sudo mount -t nfs $nfs /shared
            mkdir -p gpt_jax
            tar xzf gpt_jax.tar.gz -C gpt_jax
            python3 -m pip install --user uv
            python3 -m uv venv --python 3.12 --clear gpt_jax/.venv
            python3 -m uv pip install --python gpt_jax/.venv/bin/python './gpt_jax[tpu]'"
        ;;
    train)
        on_each_host "
            cd gpt_jax
            exec .venv/bin/python train.py configs/gpt2_124m.py --data.dir /shared/data/web --out-dir $run \
                --coordinator auto --parallel.fsdp 16 --auto-resume"
        ;;
    stop) on_each_host "pkill -TERM -f '[t]rain\.py configs'" ;; # [t]: so that the pattern does not match itself
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
