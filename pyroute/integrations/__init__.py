"""Other stacks running on pyroute: a module each, with ``install()`` and ``uninstall()``; importing patches nothing."""
