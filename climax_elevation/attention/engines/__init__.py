"""One engine a module, as ENGINE; the module's name is the engine's."""
