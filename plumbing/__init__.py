"""What the four scripts import and no paper mentions. Here: what libraries must not print."""

import logging
import sys
import warnings

# peft asks for this property of every model. The warning does not concern the user.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# peft imports bitsandbytes where that is installed. On some CPUs, bitsandbytes then logs that a
# kernel for 4 bit is missing, which concerns only commands that ask for 4 bit. So peft must not be
# imported before this package.
if "4bit" not in sys.argv:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
