"""The one exception for what a user can mend: what is wrong, where, and the edit to make."""


class UserError(ValueError):
    """A mistake in the user's configuration, data or files. The command line prints it as one line and exits 2.

    what   the fact, in one clause ("unknown key learning_rte")
    where  file:line, data row, checkpoint folder or argument name; may be empty
    mend   the edit to make ("did you mean learning_rate?"); may be empty
    keys   the keys of the configuration that it is about; may be empty
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "", keys: tuple[str, ...] = ()):
        self.what, self.where, self.mend, self.keys = what, where, mend, keys
        super().__init__(f"{where}: " * bool(where) + what + f". {mend}" * bool(mend))
