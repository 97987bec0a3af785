import sys

from pliant.cli.main import main

sys.exit(main())
