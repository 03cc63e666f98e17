import subprocess
import sys


def test_prefect_is_not_imported_before_the_environment_is_set():
    """Imported without PREFECT_API_URL, it starts a server of its own."""
    code = "import sys, demo.__main__, demo.programs; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
