"""`python -m expo_ray.cli`: the command line, where the script `expo-ray` is not on the path."""

import sys

from expo_ray.cli.process import main

sys.exit(main())
