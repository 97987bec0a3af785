from pliant.cli.main import program

program()
