from projects.pl_tiny.cli import main

if __name__ == "__main__":
    main()
