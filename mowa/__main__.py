from mowa.cli.main import main

main()
