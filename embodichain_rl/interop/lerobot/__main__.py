"""``lerobot-train`` over a live buffer, from the command line."""

from embodichain_rl.interop.lerobot.training import main

if __name__ == "__main__":
    main()
