#!/usr/bin/env bash
# Write down what an environment ran with: `.ci/lock.sh > .ci/requirements.lock`.
pip freeze --exclude-editable --exclude hfkit | sed 's/+cpu$//' | sort -f
