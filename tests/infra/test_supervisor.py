import pytest
from supervisor.options import ServerOptions

from infra.stack.programs import PROGRAMS
from infra.stack.settings import StackSettings
from infra.stack.supervisor import Supervisor, configuration


@pytest.fixture(params=["state", "with space", "quo'te"])
def parsed_configuration(request, tmp_path):
    """The settings, and the configuration as supervisor itself parses it."""
    settings = StackSettings(state=tmp_path / request.param)
    settings.logs.mkdir(parents=True)
    path = settings.state / "supervisor.conf"
    with path.open("w") as file:
        configuration(settings).write(file)
    options = ServerOptions()
    options.realize(["-c", str(path)])
    return settings, options


def test_programs_are_restarted_have_bounded_logs_and_stop_as_groups(parsed_configuration):
    settings, options = parsed_configuration
    programs = {group.name: group.process_configs[0] for group in options.process_group_configs}
    assert list(programs) == list(PROGRAMS)
    for name, program in programs.items():
        assert program.autorestart is not False
        assert program.stopasgroup
        assert program.killasgroup
        assert program.stdout_logfile == str(settings.logs / f"{name}.log")
        assert 0 < program.stdout_logfile_maxbytes <= 10 * 2**20
        assert program.command.endswith(f"-m infra.stack run {name}")
    assert [name for name, program in programs.items() if not program.autostart] == [
        "worker",
        "bridge",
        "ui",
        "exporter",
    ]


def test_only_the_owner_can_use_the_socket_and_all_files_are_in_the_state_folder(
    parsed_configuration,
):
    settings, options = parsed_configuration
    (server,) = options.server_configs
    assert server["file"] == str(settings.socket)
    assert server["chmod"] == 0o700
    assert options.pidfile == str(settings.state / "supervisor.pid")
    assert options.logfile == str(settings.logs / "supervisor.log")


def test_requests_without_a_manager_do_nothing(tmp_path):
    supervisor = Supervisor(StackSettings(state=tmp_path))
    assert not supervisor.is_running()
    assert supervisor.programs() == {}
    supervisor.stop_program("s3")
    supervisor.shut_down()
